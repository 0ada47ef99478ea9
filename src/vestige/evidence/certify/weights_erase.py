"""The checks that every eraser must pass, on small random models and on a classifier of handwritten digits."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.func import functional_call

from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError, TrainingError, VestigeError
from vestige.evidence.certify.erasing import EraserCase, Problem, digits, seeded, state, untrained
from vestige.evidence.certify.suite import NotApplicable, Seen, Suite, expect, refused
from vestige.evidence.references import asked_of, reference_of
from vestige.weights.erase.eraser import Eraser
from vestige.weights.erase.random_label_forgetting import random_labels
from vestige.weights.erase.retrain import Retrain

KINDS = ("classifier", "language model")
LEARNT = 0.7
"""Accuracy on the digit that a trained model must have, for there to be something to forget."""

suite = Suite(Eraser, case=EraserCase)


def steady(method: Any, **changes: Any) -> Any:
    """The method, training for three steps where it trains, and with no rule that stops it."""
    wanted = {"tolerance": None, "target": None, "epochs": 3, **changes}
    if "eraser" in method.parameters():
        wanted["eraser"] = steady(method.eraser)
    return method.replace(**{name: value for name, value in wanted.items() if name in method.parameters()})


def forms(method: Any) -> Iterator[Any]:
    """The method, and its forms that differ in one choice or switch."""
    yield method
    for name, hint in get_type_hints(type(method)).items():
        values = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for value in values if name in method.parameters() else ():
            if value != getattr(method, name):
                yield method.replace(**{name: value})


def row_logits(model: Any, kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The logits of one row (labels, classes), and the labels that they are to predict (labels,), written out."""

    def logits(weights: dict[str, Tensor], row: dict[str, Any], labels: Any = None) -> tuple[Tensor, Tensor]:
        if kind == "classifier":
            found = functional_call(model, weights, (), {"pixel_values": row["pixel_values"][None]}).logits
            return found, torch.as_tensor(row["labels"] if labels is None else labels).reshape(1)
        found = functional_call(model, weights, (), {"input_ids": row["input_ids"][None]}).logits
        return found[0, :-1], (row["input_ids"] if labels is None else labels)[1:]

    return logits


def row_loss(model: Any, kind: str) -> Callable[..., Tensor]:
    """The negative log-likelihood of one row, written out."""
    logits_of = row_logits(model, kind)

    def loss(weights: dict[str, Tensor], row: dict[str, Any], labels: Any = None, over: str = "mean") -> Tensor:
        logits, due = logits_of(weights, row, labels)
        each = logits.logsumexp(1) - logits[torch.arange(len(due)), due]
        return each.mean() if over == "mean" else each.sum()

    return loss


def linear(model: Any) -> dict[str, list[list[str]]]:
    """The names of the weights of each block's linear maps."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[list[str]]] = {"mlp": [], "attention": []}
    for layer in Anatomy.of(model).layers:
        attention = (layer.query, layer.key, layer.value, layer.output)
        for part, each in (("mlp", (layer.gate, layer.up, layer.down)), ("attention", attention)):
            found[part].append(list(dict.fromkeys(names[id(m.stored)] for m in each if m is not None)))
    return found


def drawn(problem: Problem, kind: str, different: bool) -> list[Tensor]:
    """The labels that are drawn for the rows to forget."""
    classes = problem.model.config.num_labels if kind == "classifier" else problem.model.config.vocab_size
    labels = [torch.as_tensor(row["labels" if kind == "classifier" else "input_ids"]).clone() for row in problem.forget]
    for row in labels if kind == "language model" else ():
        row[0] = -100  # nothing predicts it
    return [random_labels(row, classes, different, 0, place) for place, row in enumerate(labels)]


@suite.check("reference")
def weights_agree_with_the_equations(case: EraserCase) -> Seen:
    """All weights, of a classifier and of a language model, end where the written-out float64 equations lead."""
    reference = reference_of(case.method.name)
    expect(hasattr(reference, "erase"), "the reference has no function 'erase'")
    largest, moved, compared = 0.0, math.inf, 0
    for kind in KINDS:
        problem = case.problem(kind)
        written = copy.deepcopy(problem.model).cpu()  # the equations are worked out here, wherever the method works
        before = {name: p.detach() for name, p in written.named_parameters()}
        with seeded(0):
            again = type(problem.model)(problem.model.config).double()
        fresh = {name: p.detach() for name, p in again.named_parameters()}
        for method in forms(steady(case.fitted)):
            inner = getattr(method, "eraser", method)
            known = {
                **method._values(),
                "row_loss": row_loss(written, kind),
                "row_logits": row_logits(written, kind),
                "linear": linear(written),
                "causal": kind == "language model",
                "weights": before,
                "fresh": fresh,
                "drawn": drawn(problem, kind, getattr(inner, "different", True)),
                "forget": problem.forget,
                "retain": problem.retain,
            }
            due = reference.erase(**asked_of(reference.erase, known))  # type: ignore[union-attr]
            trace = case.erase(problem, method, batch_size=16)
            mine = {name: p.detach().cpu().clone() for name, p in problem.model.named_parameters()}
            trace.undo()
            largest = max(largest, *(float((mine[n] - due[n]).abs().max()) for n in due))
            moved = min(moved, max(float((mine[n] - before[n]).abs().max()) for n in due))
            compared += 1
    expect(moved > 1e-5, f"no weight moved by more than {moved:.3g}, so nothing was compared")
    expect(largest < 1e-7 * max(1.0, moved), f"weights differ by up to {largest:.3g}")
    return {"difference": largest, "smallest change": moved, "comparisons": compared}


@suite.check("undo")
def weights_come_back_bit_for_bit(case: EraserCase) -> Seen:
    """After undo all weights, buffers and logits are those of before, and the model is as the user left it."""
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            problem = case.problem(kind, dtype)
            model = problem.model
            before, config = state(model), model.config.to_dict()
            modes = [part.training for part in model.modules()]
            trace = case.erase(problem)
            after = state(model)
            expect(any(not torch.equal(after[n], before[n]) for n in before), f"{kind}: no weight changed")
            expect(bool(Patch.active(model)), f"{kind}: the change is not held by a patch")
            trace.undo()
            wrong = [name for name, value in state(model).items() if not torch.equal(value, before[name])]
            expect(not wrong, f"{kind}, {dtype}: {', '.join(wrong[:3])} did not come back")
            expect(not Patch.active(model), f"{kind}: a patch is left")
            expect(all(p.grad is None for p in model.parameters()), f"{kind}: gradients are left")
            expect(modes == [part.training for part in model.modules()], f"{kind}: training modes changed")
            expect(model.config.to_dict() == config, f"{kind}: the config changed")
    return {"models": 4}


@suite.check("bytes")
def what_is_held_for_undo_is_counted(case: EraserCase) -> Seen:
    """The bytes that a trace reports are those of the storage that is alive because of it, and none after undo."""
    seen = {}
    for kind in KINDS:
        problem = case.problem(kind, torch.float32)
        case.erase(problem).undo()  # whatever is made once for a model is there now
        known = set(_storages())
        trace = case.erase(problem)
        new = {place: size for place, size in _storages().items() if place not in known}
        expect(trace.nbytes > 0, f"{kind}: nothing is reported")
        expect(sum(new.values()) == trace.nbytes, f"{kind}: {sum(new.values())} bytes held, {trace.nbytes} reported")
        seen[kind] = trace.nbytes
        trace.undo()
        expect(trace.nbytes == 0, f"{kind}: {trace.nbytes} bytes reported after undo")
        left = sum(size for place, size in _storages().items() if place not in known)
        expect(left == 0, f"{kind}: {left} bytes are still held after undo")
    return seen


def _storages() -> dict[int, int]:
    """All storages of living tensors: place and bytes."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return {place: size for place, size in found.items() if place}


@suite.check("invariance")
def padding_changes_nothing(case: EraserCase) -> Seen:
    """A language model ends with the same weights whether rows are padded on the right, and how far, or on the left."""
    problem, method = case.problem("language model"), steady(case.fitted)
    ends = []
    for side, width in ((None, 0), ("right", 19), ("left", 19)):
        trace = case.erase(problem, method, batch_size=16, collate=side and _padder(side, width))
        ends.append(state(problem.model))
        trace.undo()
    largest = max(float((end[n] - ends[0][n]).abs().max()) for end in ends[1:] for n in end)
    expect(largest < 1e-7, f"weights differ by up to {largest:.3g}")
    return {"difference": largest}


def _padder(side: str, width: int) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        def wide(value: Tensor, fill: int) -> Tensor:
            rest = value.new_full((width - len(value),), fill)
            return torch.cat([rest, value] if side == "left" else [value, rest])

        held = [torch.ones_like(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.stack([wide(row["input_ids"], 0) for row in rows]),
            "labels": torch.stack([wide(row["labels"], -100) for row in rows]),
            "attention_mask": torch.stack([wide(mask, 0) for mask in held]),
        }

    return collate


@suite.check("invariance")
def a_seed_decides_everything(case: EraserCase) -> Seen:
    """The same seed gives the same weights bit for bit; torch's random numbers are neither used nor changed."""
    problem = case.problem("classifier", torch.float32)
    ends = []
    for other in (1, 2):
        with seeded(other):
            before = torch.random.get_rng_state()
            trace = case.erase(problem, batch_size=2)
            expect(torch.equal(before, torch.random.get_rng_state()), "torch's random numbers were used")
        ends.append(state(problem.model))
        trace.undo()
    wrong = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    expect(not wrong, f"{', '.join(wrong[:3])} differ")
    return {"weights": len(ends[0])}


@suite.check("invariance")
def bfloat16_stays_finite(case: EraserCase) -> Seen:
    """Models in bfloat16 keep finite weights and logits."""
    for kind in KINDS:
        problem = case.problem(kind, torch.bfloat16)
        trace = case.erase(problem)
        finite = all(bool(p.isfinite().all()) for p in problem.model.parameters())
        trace.undo()
        expect(finite, f"{kind}: weights are not finite")
    return {"models": len(KINDS)}


@suite.check("behaviour", slow=True, claim=True)
def a_digit_is_forgotten_and_the_others_are_not(case: EraserCase) -> Seen:
    """On unseen images a digit does about as badly, and the others about as well, as in a model that never saw it."""
    seen: dict[str, list[float]] = {name: [] for name in ("digit before", "digit", "digit retrained")}
    seen |= {name: [] for name in ("others before", "others", "others retrained")}
    for seed in case.seeds:
        task = digits(seed)
        model = task.model()
        start = {"start": untrained} if _starts(case) else {}
        sets = {"forget": task.forget, "retain": task.retain, "held_out": task.held_out}
        before, retrained = task.accuracies(model), task.accuracies(task.model(without=True))
        case.fitted.erase(model, **sets, batch_size=50, seed=seed, **start)
        after = task.accuracies(model)
        for when, (digit, others) in ((" before", before), ("", after), (" retrained", retrained)):
            seen[f"digit{when}"].append(digit)
            seen[f"others{when}"].append(others)
        expect(before[0] > LEARNT, f"seed {seed}: there was nothing to forget: {seen}")
        expect(after[0] <= retrained[0] + 0.1, f"seed {seed}: the digit is still known: {seen}")
        expect(after[1] >= retrained[1] - 0.1, f"seed {seed}: other digits were lost: {seen}")
    return seen


@suite.check("bad input")
def impossible_sets_are_refused(case: EraserCase) -> Seen:
    """Sets that are empty, overlap or have labels out of range are refused by name before any weight changes."""
    tried = 0
    for kind in KINDS:
        problem = case.problem(kind, torch.float32)
        wrong_label = (
            [{**problem.forget[0], "labels": 5}]
            if kind == "classifier"
            else [{**problem.forget[0], "labels": problem.forget[0]["input_ids"] + 1000}]
        )
        row = problem.forget[0]
        unlabelled = {key: value for key, value in row.items() if key == "pixel_values"}
        wrong: list[tuple[dict[str, Any], type[VestigeError], str]] = [
            ({"forget": []}, InputError, "forget"),
            ({"retain": []}, InputError, "retain"),
            ({"held_out": []}, InputError, "held_out"),
            ({"retain": [*problem.retain, problem.forget[1]]}, InputError, "overlap"),
            ({"held_out": [problem.forget[1]]}, InputError, "overlap"),
            ({"forget": wrong_label}, InputError, "out of range"),
            ({"retain": [*problem.retain, *wrong_label]}, InputError, "out of range"),
            ({"forget": [unlabelled]}, InputError, "labels"),
            ({"forget": 3}, InputError, "forget"),
            ({"batch_size": 0}, SpecError, "batch_size"),
        ]
        before = state(problem.model)
        for options, error, word in wrong:
            refused(error, lambda p=problem, o=options: case.erase(p, **o).undo(), word)  # type: ignore[misc]
            tried += 1
        expect(all(torch.equal(v, before[n]) for n, v in state(problem.model).items()), "weights changed")
        expect(not Patch.active(problem.model), "a patch is left")
    return {"refused": tried}


@suite.check("bad input")
def a_loss_that_is_no_number_stops_and_changes_nothing(case: EraserCase) -> Seen:
    """Where the loss is not finite a TrainingError is raised, and the model is as it was."""
    problem = case.problem("classifier", torch.float32)
    broken = [{**row, "pixel_values": row["pixel_values"] * math.inf} for row in problem.retain]
    before = state(problem.model)
    refused(TrainingError, lambda: case.erase(problem, retain=broken).undo(), "finite")
    expect(all(torch.equal(v, before[n]) for n, v in state(problem.model).items()), "weights changed")
    expect(not Patch.active(problem.model), "a patch is left")
    return {"stopped": 1}


@suite.check("bad input", fills=False)
def over_forgetting_is_stopped(case: EraserCase) -> Seen:
    """A step that is far too large ends at weights that do not hurt held-out examples by more than is allowed."""
    method = getattr(case.fitted, "eraser", case.fitted)
    if not {"tolerance", "learning_rate"} <= method.parameters().keys():
        raise NotApplicable("the method does not train on the forget set step by step")
    task = digits(case.seeds[0])
    model = task.model()
    wild = method.replace(learning_rate=0.3, epochs=2, tolerance=0.2, target=None, retain_weight=0.0, clip=None)
    wild = case.fitted.replace(eraser=wild) if "eraser" in case.fitted.parameters() else wild
    known = task.accuracies(model)[1]
    trace = wild.erase(model, forget=task.forget, retain=task.retain, held_out=task.held_out, batch_size=50)
    others = task.accuracies(model)[1]
    expect(trace.stopped == "over-forgetting", f"it ended as {trace.stopped!r}: {trace.history}")
    expect(others > known - 0.1, f"accuracy on other digits fell from {known} to {others}")
    return {"others before": known, "others": others}


def _starts(case: EraserCase) -> bool:
    return isinstance(case.method, Retrain)
