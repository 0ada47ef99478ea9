"""The claim of prototype-sample relation distillation: without a stored example, some of what was learnt stays."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim

SETTINGS = {"views": 1, "relations": 1.0, "over": "prototypes"}
"""Chosen on other seeds: the digits are not changed at random, and few steps leave less room for distillation."""


@claim(slow=True)
def relations_to_prototypes_keep_old_digits(case: LearnerCase) -> Seen:
    """Where nobody tells the task, accuracy over all digits ends above fine-tuning's, and new ones are learnt."""
    mine = case.method.replace(**SETTINGS)
    seen = keeps_more(case, mine, 0.1)
    seen["learnt"] = [case.on_digits(mine, seed).plasticity for seed in case.seeds]
    expect(all(learnt > 0.6 for learnt in seen["learnt"]), f"little is learnt: {seen}")
    return seen


@claim(slow=True)
def relations_keep_more_than_features_alone(case: LearnerCase) -> Seen:
    """Without the distillation, features and prototypes learnt alike end lower, over the seeds."""
    mine = [case.on_digits(case.method.replace(**SETTINGS), seed).average for seed in case.seeds]
    free = [case.on_digits(case.method.replace(**{**SETTINGS, "relations": 0.0}), seed).average for seed in case.seeds]
    seen = {"average": mine, "without relations": free}
    expect(sum(mine) > sum(free), f"no more is kept: {seen}")
    return seen
