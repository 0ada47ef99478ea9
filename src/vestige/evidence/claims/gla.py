"""Claims of GLA: what fades by choice makes room for what comes."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase, tells_the_last_word
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim


@claim(slow=True)
def the_last_word_counts(case: LayerCase) -> Seen:
    """Where keys are written anew, the new value is recalled more often than by linear attention, which cannot tell."""
    return tells_the_last_word(case, steps=300)
