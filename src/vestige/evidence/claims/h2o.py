"""Claims of H2O: few tokens gather most of the attention, and keeping them beats keeping recent tokens alone."""

from __future__ import annotations

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, READ, beats_a_window, holds_more_attention, read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def heavy_hitters_hold_the_attention(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    seen = holds_more_attention(case, case.method)
    share = float(read_on(case, case.method).share.mean())
    expect(share > 4 * BUDGET / READ, f"they hold little more than their number: {seen}")
    return seen


@claim
def heavy_hitters_beat_a_window(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than with a window of recent tokens of the same size."""
    return beats_a_window(case, case.method)
