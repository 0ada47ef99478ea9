"""The claim of FPF: fine-tuning the few modules that forget on a small buffer repairs the model."""

from __future__ import annotations

from vestige.evidence.certify.suite import Seen
from vestige.evidence.certify.weights_retain import LearnerCase, keeps_more
from vestige.evidence.claims import claim


@claim(slow=True)
def a_short_repair_brings_old_digits_back(case: LearnerCase) -> Seen:
    """Accuracy over all digits ends far above fine-tuning's, without any replay during training."""
    return keeps_more(case, case.method, 0.2)


@claim(slow=True)
def repairs_at_even_intervals_do_as_well_without_boundaries(case: LearnerCase) -> Seen:
    """k-FPF, six repairs over the stream wherever its boundaries are, ends far above fine-tuning too."""
    return keeps_more(case, case.method.replace(bursts=6), 0.2)
