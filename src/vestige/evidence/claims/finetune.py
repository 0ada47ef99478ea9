"""The claim of fine-tuning, which is that of the whole field: what is learnt next destroys what was learnt before."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def each_experience_destroys_the_one_before(case: LearnerCase) -> Seen:
    """Two digits at a time are learnt far above chance, and mostly forgotten when the next two come."""
    runs = [case.on_digits(case.method, seed) for seed in case.seeds]
    seen = {"learnt": [r.plasticity for r in runs], "forgotten": [r.forgetting for r in runs]}
    expect(all(r.plasticity > 0.5 for r in runs), f"little is learnt: {seen}")
    expect(all(r.forgetting > 0.5 for r in runs), f"little is forgotten: {seen}")
    return seen
