"""The claim of replay: a few stored examples keep most of what fine-tuning loses."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim


@claim(slow=True)
def a_few_examples_keep_what_was_learnt(case: LearnerCase) -> Seen:
    """With the same steps on the same stream, accuracy over all digits ends far above fine-tuning's."""
    mine = [case.on_digits(case.method, seed) for seed in case.seeds]
    plain = [case.on_digits("finetune", seed) for seed in case.seeds]
    seen = {"average": [r.average for r in mine], "of finetune": [r.average for r in plain]}
    expect(all(m.average > p.average + 0.2 for m, p in zip(mine, plain, strict=True)), f"no more is kept: {seen}")
    return seen
