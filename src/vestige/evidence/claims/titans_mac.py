"""Claims of Titans' memory as context: what is beyond the segment is recalled."""

from __future__ import annotations

from vestige.evidence.certify.memorising import sees_beyond
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim


@claim
def it_knows_what_is_beyond_its_segment(case: LayerCase) -> Seen:
    """What stood four times as far back as attention sees changes its output, and not that of attention within a window
    as long."""
    return sees_beyond(case, case.fitted.refresh)
