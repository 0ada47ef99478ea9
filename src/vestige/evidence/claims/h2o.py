"""Claims of H2O: few tokens gather most of the attention, and keeping them beats keeping recent tokens alone."""

from __future__ import annotations

from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, READ, read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def heavy_hitters_hold_the_attention(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    mine = read_on(case, case.method)
    streaming = read_on(case, StreamingLLM())
    seen = {"share of attention kept": mine.share.tolist(), "by sinks and window": streaming.share.tolist()}
    expect(bool((mine.share > streaming.share).all()), f"heavy hitters do not hold more: {seen}")
    expect(float(mine.share.mean()) > 4 * BUDGET / READ, f"they hold little more than their number: {seen}")
    return seen


@claim
def heavy_hitters_beat_a_window(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than with a window of recent tokens of the same size."""
    mine = read_on(case, case.method)
    window = read_on(case, StreamingLLM(sinks=0))
    seen = {"divergence": mine.divergence.tolist(), "of a plain window": window.divergence.tolist()}
    expect(bool((mine.divergence < window.divergence).all()), f"a window does as well: {seen}")
    return seen
