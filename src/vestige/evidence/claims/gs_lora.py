"""The claims of group-sparse LoRA: a sequence of erasures, each of which leaves the earlier ones be; small changes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from vestige.evidence.certify.erasing import FORGOTTEN, EraserCase, digits
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

SECOND = 7
"""The digit that is forgotten after the first."""


def without(rows: TensorDataset, digit: int) -> TensorDataset:
    """The rows of other digits."""
    images, labels = rows.tensors
    return TensorDataset(images[labels != digit], labels[labels != digit])


def only(rows: TensorDataset, digit: int) -> TensorDataset:
    """The rows of one digit."""
    images, labels = rows.tensors
    return TensorDataset(images[labels == digit], labels[labels == digit])


@torch.no_grad()
def accuracy(model: object, rows: TensorDataset) -> float:
    """Share of rows answered rightly."""
    images, labels = rows.tensors
    answers: Tensor = model(pixel_values=images).logits.argmax(1)  # type: ignore[operator]
    return (answers == labels).float().mean().item()


@claim(slow=True)
def a_second_erasure_leaves_the_first_forgotten(case: EraserCase) -> Seen:
    """Of two digits, erased one after the other, neither is known in the end, and the eight others are."""
    seen: dict[str, list[float]] = {name: [] for name in ("first", "second before", "second", "others")}
    for seed in case.seeds:
        task = digits(seed)
        model = task.model()
        options = {"batch_size": 50, "seed": seed}
        case.fitted.erase(model, forget=task.forget, retain=task.retain, held_out=task.held_out, **options)
        seen["second before"].append(accuracy(model, only(task.kept_test, SECOND)))
        # The first is in neither set: nothing but the weights may hold it down.
        kept, aside = without(task.retain, SECOND), without(task.held_out, SECOND)
        case.fitted.erase(model, forget=only(task.retain, SECOND), retain=kept, held_out=aside, **options)
        seen["first"].append(accuracy(model, task.forgotten_test))
        seen["second"].append(accuracy(model, only(task.kept_test, SECOND)))
        seen["others"].append(accuracy(model, without(task.kept_test, SECOND)))
    expect(max(seen["first"]) < 0.2, f"the digit {FORGOTTEN} is known again: {seen}")
    expect(max(seen["second"]) < 0.2 < min(seen["second before"]), f"the digit {SECOND} is still known: {seen}")
    expect(min(seen["others"]) > 0.85, f"other digits were lost: {seen}")
    return seen


@claim(slow=True)
def the_penalty_keeps_changes_small(case: EraserCase) -> Seen:
    """With the penalty on groups their norms end at less than three quarters of those without, and the digit goes."""
    seen: dict[str, list[float]] = {name: [] for name in ("digit", "norms", "norms without", "active")}
    for seed in case.seeds:
        task = digits(seed)
        for name, sparsity in (("norms", 0.02), ("norms without", 0.0)):
            model = task.model()
            method = case.fitted.replace(sparsity=sparsity, group="map", target=None, check_every=20)
            sets = {"forget": task.forget, "retain": task.retain, "held_out": task.held_out}
            trace = method.erase(model, **sets, batch_size=50, seed=seed)
            seen[name].append(sum(trace.report["groups"]))
            if sparsity:
                seen["active"].append(trace.report["active"])
                seen["digit"].append(task.accuracies(model)[0])
    expect(max(seen["digit"]) < 0.2, f"the digit is still known: {seen}")
    for with_penalty, free in zip(seen["norms"], seen["norms without"], strict=True):
        expect(with_penalty < 0.75 * free, f"norms are no smaller: {seen}")
    return seen
