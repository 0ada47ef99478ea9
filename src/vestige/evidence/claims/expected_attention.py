"""Claims of expected attention: from the distribution of past queries one can tell what later ones look at."""

from __future__ import annotations

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import beats_a_window, holds_more_attention
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim


@claim(slow=True)
def later_queries_are_foreseen(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    return holds_more_attention(case, case.method)


@claim(slow=True)
def it_beats_a_window(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than with a window of recent tokens of the same size."""
    return beats_a_window(case, case.method)
