"""The claim of joint training: with all data at hand nothing is lost."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def nothing_is_lost(case: LearnerCase) -> Seen:
    """Accuracy over all digits ends far above fine-tuning's."""
    mine = [case.on_digits(case.method, seed) for seed in case.seeds]
    plain = [case.on_digits("finetune", seed) for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.3 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen
