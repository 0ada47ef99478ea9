"""The claim of FPF: fine-tuning the few modules that forget on a small buffer repairs the model."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def a_short_repair_brings_old_digits_back(case: LearnerCase) -> Seen:
    """Accuracy over all digits ends far above fine-tuning's, without any replay during training."""
    mine = [case.on_digits(case.method, seed) for seed in case.seeds]
    plain = [case.on_digits("finetune", seed) for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.2 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen


@claim(slow=True)
def repairs_at_even_intervals_do_as_well_without_boundaries(case: LearnerCase) -> Seen:
    """k-FPF, six repairs over the stream wherever its boundaries are, ends far above fine-tuning too."""
    mine = [case.on_digits(case.method.replace(bursts=6), seed) for seed in case.seeds]
    plain = [case.on_digits("finetune", seed) for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.2 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen
