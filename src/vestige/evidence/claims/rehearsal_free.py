"""The claim of rehearsal-free learning: holding predictions keeps some of what was learnt, without any data."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def held_predictions_keep_old_digits(case: LearnerCase) -> Seen:
    """Without a stored example, accuracy over all digits ends above fine-tuning's."""
    mine = [case.on_digits(case.method, seed) for seed in case.seeds]
    plain = [case.on_digits("finetune", seed) for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.0 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen
