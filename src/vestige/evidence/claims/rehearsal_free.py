"""The claim of rehearsal-free learning: holding predictions keeps some of what was learnt, without any data."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim


@claim(slow=True)
def held_predictions_keep_old_digits(case: LearnerCase) -> Seen:
    """Without a stored example, accuracy over all digits ends above fine-tuning's."""
    return keeps_more(case, case.method, 0.0)
