"""Checks for learners: reference, what they leave on a model, bytes, resuming, and bad input.

A small vision transformer learns three experiences of two digits each. Claims of single learners stand in
``vestige.evidence.claims``.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from vestige.errors import InputError, TrainingError, VestigeError
from vestige.evidence.certify.suite import Case, NotApplicable, Seen, Suite, expect, refused
from vestige.evidence.data.digits import digits, small_vit
from vestige.evidence.references import reference_of
from vestige.evidence.references.learning import Experience, Net
from vestige.weights.retain import ContinualRun, ContinualTrainer, Stream
from vestige.weights.retain.learner import Learner, Running
from vestige.weights.retain.stream import Kind

__all__ = ["LearnerCase", "keeps_more", "learners"]

ROWS, EPOCHS, RATE = 36, 3, 0.05
EXACT = 1e-9  # of weights of the order of 0.1, after nine steps in float64


@dataclass
class LearnerCase(Case):
    """A learner, and a small stream to run it on."""

    method: Learner

    @property
    def fitted(self) -> Learner:
        """The learner with hyper-parameters under which every draw takes all that there is."""
        return self.method.replace(**getattr(reference_of(self.method.name), "SMALL", {}))

    def stream(self, seed: int = 0, rows: int = ROWS, classes: int = 6, experiences: int = 3, **options: Any) -> Stream:
        """Digits 0 to ``classes`` - 1 in order."""
        kept = []
        for data in digits(seed, train=600, test=400):
            images, labels = data.tensors
            few = torch.cat([torch.nonzero(labels == c).flatten()[: rows // classes] for c in range(classes)])
            kept.append(TensorDataset(images[few], labels[few]))
        return Stream.by_class(*kept, experiences=experiences, **options)

    def general(self) -> Any:
        """General samples, where the learner needs them: digits that the stream does not hold."""
        if not self.method.needs_general:
            return None
        images, labels = digits(7)[0].tensors
        return TensorDataset(images[labels > 5][:12], labels[labels > 5][:12])

    def args(self, folder: str = "unused", **options: Any) -> TrainingArguments:
        plain: dict[str, Any] = {
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "report_to": "none",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
        }
        return TrainingArguments(output_dir=folder, **{**plain, **options})

    def learn(self, learner: Learner, model: Any, stream: Stream, args: Any, **options: Any) -> ContinualRun:
        with quiet():
            trainer = ContinualTrainer(model, learner, args, general=self.general(), **options)
            return trainer.run(stream)

    def on_digits(
        self, learner: Learner | str | dict[str, Any], seed: int, kind: Kind = "class", epochs: int = 16
    ) -> ContinualRun:
        """Six digits, two at a time, learnt by a small vision transformer: what claims look at. Runs are kept."""
        chosen = learner if isinstance(learner, Learner) else Learner.from_spec(learner)
        return _on_digits(chosen, seed, kind, epochs, self.device)


@functools.lru_cache(maxsize=64)
def _on_digits(learner: Learner, seed: int, kind: Kind, epochs: int, device: str) -> ContinualRun:
    case = LearnerCase(method=learner, device=device)
    args = case.args(
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=240,
        learning_rate=3e-3,
        seed=seed,
    )
    stream = case.stream(seed, rows=240, kind=kind)
    return case.learn(learner, small_vit(seed).to(device), stream, args)


learners = Suite(Learner, case=LearnerCase)


def keeps_more(case: LearnerCase, learner: Learner, by: float, kind: Kind = "class") -> dict[str, list[float]]:
    """Expect accuracy over all digits to end above fine-tuning's by so much, on every seed."""
    mine, plain = ([case.on_digits(each, seed, kind).average for seed in case.seeds] for each in (learner, "finetune"))
    seen = {"average": mine, "of finetune": plain}
    expect(all(m > p + by for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


class _Spy(TrainerCallback):
    """Finds the state of the learner, and stops a run where it is told to."""

    def __init__(self, experience: int = -1, step: int = -1) -> None:
        self.stop_at = (experience, step)
        self.running: Running | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        places = [c for c in kwargs.get("callbacks", ()) if hasattr(c, "running")]
        self.running = places[0].running if places else self.running
        if args.output_dir.endswith(f"experience-{self.stop_at[0]}") and state.global_step == self.stop_at[1]:
            raise Interrupted


class Interrupted(Exception):  # noqa: N818 (what happened)
    """Stands for a kill."""


@learners.check("reference")
def weights_are_the_references(case: LearnerCase) -> Seen:
    """After three experiences of plain descent in float64 all weights, some beside the model, are the reference's."""
    module = reference_of(case.method.name)
    expect(module is not None, f"no reference for {case.method.name!r}")
    stream = case.stream()
    learner, states = _watched(case.fitted)
    model = small_vit(0).double().to(case.device)
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    parts = []  # on the CPU, as is the reference, wherever the learner is
    for e in stream:
        rows = [e.train[n] for n in range(len(e.train))]
        parts.append(
            Experience(
                torch.stack([r["pixel_values"] for r in rows]).double(),
                torch.tensor([r["labels"] for r in rows]),
            )
        )
    values = {name: getattr(learner, name) for name in learner.parameters()}
    if case.method.needs_general:
        images, labels = case.general().tensors
        values["general"] = Experience(images.double(), labels)
    net = Net(small_vit(0).double().eval())
    due = module.learn(net, start, parts, lr=RATE, epochs=EPOCHS, **values)  # type: ignore[union-attr]
    args = case.args(
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=ROWS * 3,
        per_device_eval_batch_size=ROWS,
        num_train_epochs=EPOCHS,
    )
    case.learn(learner, model, stream, args, collator=_double)
    found = {**{name: p.detach() for name, p in model.named_parameters()}, **states[0].learnt()}
    worst = max(float((value.cpu() - due[name]).abs().max()) for name, value in found.items())
    moved = max(float((due[name] - start[name]).abs().max()) for name in start)
    expect(worst <= EXACT, f"weights differ from the reference by {worst:.3g}, having moved by {moved:.3g}")
    return {"largest difference": worst, "largest movement": moved, "beside the model": len(found) - len(start)}


def _watched(learner: Learner) -> tuple[Learner, list[Running]]:
    """A copy of a learner, and the list that its states are noted in."""
    states: list[Running] = []
    same = learner.replace()
    make = same.run_state

    def noted() -> Running:
        states.append(make())
        return states[-1]

    object.__setattr__(same, "run_state", noted)
    return same, states


def _double(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([torch.as_tensor(r["pixel_values"]) for r in rows]).double(),
        "labels": torch.tensor([int(r["labels"]) for r in rows]),
    }


@learners.check("undo")
def nothing_stays_on_the_model(case: LearnerCase) -> Seen:
    """After a run, and after one that was cut, no hook, module, wrapper or frozen weight is left on the model."""
    for cut in (False, True):
        model = small_vit(0).to(case.device)
        before = _outside(model)
        with tempfile.TemporaryDirectory() as folder:
            args = case.args(folder, save_strategy="steps", save_steps=2) if cut else case.args()
            spy = _Spy(1, 3) if cut else _Spy()
            try:
                case.learn(case.method, model, case.stream(), args, callbacks=[spy])
                expect(not cut, "the run was not cut where it should have been")
            except Interrupted:
                expect(cut, "the run was cut")
        expect(_outside(model) == before, f"the model is not as before: {_outside(model) ^ before}")
    return {"runs": 2}


def _outside(model: torch.nn.Module) -> set[Any]:
    """All of a model but the values of its weights."""
    modules = {(name, type(part), len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
               for name, part in model.named_modules()}  # fmt: skip
    weights = {(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    own = {(name, key) for name, part in model.named_modules() for key in vars(part)}
    return modules | weights | own


@learners.check("bytes")
def bytes_are_what_the_learner_holds(case: LearnerCase) -> Seen:
    """The bytes reported are those of all tensors that the learner's state holds at the end."""
    learner, states = _watched(case.method)
    model = small_vit(0).to(case.device)
    run = case.learn(learner, model, case.stream(), case.args())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    _walk(states[0].__dict__, found, set())
    held = sum(size for place, size in found.items() if place not in own)
    reported = states[0].nbytes()
    total = sum(reported.values())
    # A few numbers that are kept as such, and not in tensors, may be counted as the tensors that store them.
    expect(held <= total <= held + 64 * ROWS, f"{total} bytes are reported, {held} are held")
    expect(run.replay_bytes >= reported["replay_bytes"], "the result reports less than was held at the end")
    return {"held": held, **reported}


def _walk(value: Any, found: dict[int, int], seen: set[int]) -> None:
    """The storages that can be reached from an object, models left out."""
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for inner in value.values():
            _walk(inner, found, seen)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            _walk(inner, found, seen)
    elif type(value).__module__.startswith("vestige.weights") and hasattr(value, "__dict__"):
        _walk(value.__dict__, found, seen)


@learners.check("invariance")
def a_cut_run_goes_on_to_the_same_weights(case: LearnerCase) -> Seen:
    """Killed between two updates of the second experience and taken up, all scores and weights are bit for bit those
    of a run that was not."""

    def build() -> Any:
        return small_vit(0, hidden_dropout_prob=0.1).to(case.device)

    def saving(folder: str) -> TrainingArguments:
        return case.args(folder, save_strategy="steps", save_steps=2, save_total_limit=2)

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole, cut, again = build(), build(), build()
        due = case.learn(case.method, whole, case.stream(), saving(one))
        try:
            case.learn(case.method, cut, case.stream(), saving(other), callbacks=[_Spy(1, 3)])
            expect(False, "the run was not cut where it should have been")
        except Interrupted:
            pass
        with quiet():
            trainer = ContinualTrainer(again, case.method, saving(other), general=case.general())
            run = trainer.run(case.stream(), resume=True)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    expect(same, "weights differ after the run was taken up")
    expect((run.matrix == due.matrix).all(), f"scores are {run.matrix.tolist()}, not {due.matrix.tolist()}")
    return {"experiences": len(run.matrix)}


@learners.check("invariance")
def bfloat16_is_finite(case: LearnerCase) -> Seen:
    """With mixed precision in bfloat16 every weight and score is finite."""
    model = small_vit(0).to(case.device)
    run = case.learn(case.method, model, case.stream(), case.args(bf16=True))
    expect(all(bool(p.isfinite().all()) for p in model.parameters()), "a weight is not finite")
    return {"average": run.average}


@learners.check("invariance", slow=True)
def a_sum_with_nothing_is_the_learner(case: LearnerCase) -> Seen:
    """Added to fine-tuning, which does nothing of its own, a learner does bit for bit what it does alone."""
    if case.method.name == "finetune":
        raise NotApplicable("this is the learner that does nothing")
    ways = [case.method, case.method + Learner.from_spec("finetune"), Learner.from_spec("finetune") + case.method]
    models = [small_vit(0).to(case.device) for _ in ways]
    for learner, model in zip(ways, models, strict=True):
        case.learn(learner, model, case.stream(), case.args())
    for model in models[1:]:
        same = all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))
        expect(same, "a sum with fine-tuning gives other weights")
    return {"sums": 2}


@learners.check("bad input")
def wrong_streams_are_refused(case: LearnerCase) -> Seen:
    """No stream, a label that the model lacks, missing classes or general samples: clear errors, no training."""
    whole = case.stream()
    wrong: list[tuple[Any, Any]] = [("no stream", small_vit(0)), (whole, small_vit(0, num_labels=4))]
    if case.method.needs_classes:
        wrong.append((Stream.of([digits(0)]), small_vit(0)))
    for stream, model in wrong:
        before = [p.detach().clone() for p in model.parameters()]
        refused(VestigeError, lambda m=model, s=stream: case.learn(case.method, m, s, case.args()))  # type: ignore[misc]
        expect(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "weights have changed")
    if case.method.needs_general:
        refused(InputError, lambda: ContinualTrainer(small_vit(0), case.method, case.args()))
    return {"refused": len(wrong) + case.method.needs_general}


@learners.check("bad input")
def a_loss_that_is_no_number_stops(case: LearnerCase) -> Seen:
    """Inputs that make the loss NaN stop the run, which says where; the weights stay finite."""
    stream = case.stream()
    images = stream[1].train.source.tensors[0].clone()
    images[stream[1].train.rows] = float("nan")
    broken = Stream.by_class(
        TensorDataset(images, stream[1].train.source.tensors[1]), stream[1].test.source, experiences=3
    )
    model = small_vit(0).to(case.device)
    text = refused(TrainingError, lambda: case.learn(case.method, model, broken, case.args()), "experience 1")
    expect(all(bool(p.isfinite().all()) for p in model.parameters()), "weights are not finite")
    return {"error": text[:60]}
