"""The claim of adaptive SVD: learning outside the important directions forgets less."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def outside_the_important_directions_less_is_forgotten(case: LearnerCase) -> Seen:
    """Where the task is known, accuracy over all digits ends above fine-tuning's."""
    mine = [case.on_digits(case.method, seed, "task") for seed in case.seeds]
    plain = [case.on_digits("finetune", seed, "task") for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.0 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen
