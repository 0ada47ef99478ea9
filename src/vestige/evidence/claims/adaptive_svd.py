"""The claim of adaptive SVD: learning outside the important directions forgets less."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim


@claim(slow=True)
def outside_the_important_directions_less_is_forgotten(case: LearnerCase) -> Seen:
    """Where the task is known, accuracy over all digits ends above fine-tuning's."""
    return keeps_more(case, case.method, 0.0, "task")
