"""Claims about decoding against overshadowing, on small models that have learnt statements of unequal frequency."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vestige.evidence.certify.context_steer import SteerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.studies.overshadowing import OvershadowingGrowth, Statements, ask, learn, separation

RATIO, LENGTH = 16, 4  # common statements for each rare one; words of a subject


@functools.lru_cache(maxsize=4)
def _learnt(seed: int) -> tuple[Any, Statements]:
    study = OvershadowingGrowth()
    data = Statements.draw(seed, study.subjects, RATIO, LENGTH)
    how = {"hidden": study.hidden, "passes": study.passes, "updates": study.updates, "rate": study.rate}
    return learn(data, seed, **how), data  # type: ignore[arg-type]


@claim(slow=True)
def rare_conditions_are_heard(case: SteerCase) -> Seen:
    """Of the rare questions that greedy decoding answers as if common, over a fifth are not; common ones stay right."""
    before, after, kept = [], [], []
    for seed in case.seeds:
        model, data = _learnt(seed)
        plain, against = ask(model, data, 48), ask(model, data, 48, case.method)
        before.append(float(plain.overshadowed.double().mean()))
        after.append(float(against.overshadowed.double().mean()))
        kept.append(float(against.common.double().mean() / plain.common.double().mean()))
    seen = {"overshadowed, greedily": before, "with self-contrast": after, "common ones kept": kept}
    expect(min(before) > 0.1, f"hardly anything is overshadowed, so nothing can be relieved: {seen}")
    expect(all(b < a for a, b in zip(before, after, strict=True)), f"a seed gains nothing: {seen}")
    expect(sum(after) < 0.8 * sum(before), f"too little is gained: {seen}")
    expect(min(kept) >= 0.95, f"common questions suffer: {seen}")
    return {name: ", ".join(f"{value:.2f}" for value in values) for name, values in seen.items()}


@claim(slow=True)
def overshadowing_is_foreseen(case: SteerCase) -> Seen:
    """Before anything is said, the indicator tells questions that will be answered wrongly from those that will not."""
    told = []
    for seed in case.seeds:
        model, data = _learnt(seed)
        plain, against = ask(model, data, 48), ask(model, data, 48, case.method)
        assert against.indicators is not None
        rare, common = against.indicators
        told.append(float(separation(rare[plain.overshadowed], torch.cat([rare[plain.right], common[plain.common]]))))
    expect(min(told) >= 0.7, f"the chance of the right order is only {told}")
    return {"chance of the right order": ", ".join(f"{value:.2f}" for value in told)}
