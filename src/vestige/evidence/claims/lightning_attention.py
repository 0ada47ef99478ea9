"""Claims of lightning attention: order counts, and a token costs the same at every length."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase, costs_the_same_at_every_length, tells_the_last_word
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim


@claim(slow=True)
def the_last_word_counts(case: LayerCase) -> Seen:
    """Where keys are written anew, the new value is recalled more often than by linear attention, which cannot tell."""
    return tells_the_last_word(case)


@claim(slow=True)
def a_token_costs_the_same_at_every_length(case: LayerCase) -> Seen:
    """Read at once, 2048 tokens take as many operations per token as 256 do; softmax attention takes ever more."""
    return costs_the_same_at_every_length(case)
