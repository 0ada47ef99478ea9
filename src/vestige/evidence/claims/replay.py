"""The claim of replay: a few stored examples keep most of what fine-tuning loses."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim


@claim(slow=True)
def a_few_examples_keep_what_was_learnt(case: LearnerCase) -> Seen:
    """With the same steps on the same stream, accuracy over all digits ends far above fine-tuning's."""
    return keeps_more(case, case.method, 0.2)
