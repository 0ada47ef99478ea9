"""The findings on random labels: how far forgetting spreads beyond the rows trained on, and what probes still read."""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

from vestige.evidence.certify.erasing import EraserCase, digits
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.erasure.probe import Probed, probe
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Examples, Reader
from vestige.weights.modes import evaluating


def read_by_a_probe(model: Any, forget: TensorDataset, retain: TensorDataset, seed: int) -> float:
    """The share of rows to forget whose digit a linear probe reads from the states of the best layer."""
    reader = Reader.of(model, None)
    gone, kept = Examples(forget, "forget", reader), Examples(retain, "retain", reader)
    work = Work(model, gone, kept, kept, reader, 200, seed, dict(model.named_parameters()))
    with evaluating(model, gradients=True):
        found = probe(work, gone, kept)
    assert isinstance(found, Probed)
    return max(found.forget)


@claim(slow=True)
def it_spreads_to_other_rows_of_the_digit_and_probes_still_read_it(case: EraserCase) -> Seen:
    """Random labels on half of a digit's rows lower unseen rows' accuracy too; a linear probe reads the digit still."""
    names = ("unseen before", "unseen", "others before", "others", "probe before", "probe", "probe retrained")
    seen: dict[str, list[float]] = {name: [] for name in names}
    for seed in case.seeds:
        task = digits(seed)
        model = task.model()
        half = TensorDataset(*(part[::2] for part in task.forget.tensors))
        before = task.accuracies(model)
        few = TensorDataset(*(part[:300] for part in task.retain.tensors))
        probed = [read_by_a_probe(model, task.forgotten_test, few, seed)]
        case.fitted.erase(model, forget=half, retain=task.retain, held_out=task.held_out, batch_size=50, seed=seed)
        after = task.accuracies(model)
        probed += [read_by_a_probe(m, task.forgotten_test, few, seed) for m in (model, task.model(without=True))]
        values = (before[0], after[0], before[1], after[1], *probed)
        for name, value in zip(names, values, strict=True):
            seen[name].append(value)
    expect(max(seen["unseen"]) < min(seen["unseen before"]) / 2, f"it stays with the rows trained on: {seen}")
    expect(min(seen["others"]) > 0.8, f"other digits were lost: {seen}")
    expect(min(seen["probe"]) > 0.8, f"a probe reads the digit no more: {seen}")
    return seen
