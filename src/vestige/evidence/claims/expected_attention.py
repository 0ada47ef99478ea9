"""Claims of expected attention: from the distribution of past queries one can tell what later ones look at."""

from __future__ import annotations

from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def later_queries_are_foreseen(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    mine = read_on(case, case.method)
    streaming = read_on(case, StreamingLLM())
    seen = {"share of attention kept": mine.share.tolist(), "by sinks and window": streaming.share.tolist()}
    expect(bool((mine.share > streaming.share).all()), f"sinks and window hold as much: {seen}")
    return seen


@claim(slow=True)
def it_beats_a_window(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than with a window of recent tokens of the same size."""
    mine = read_on(case, case.method)
    window = read_on(case, StreamingLLM(sinks=0))
    seen = {"divergence": mine.divergence.tolist(), "of a plain window": window.divergence.tolist()}
    expect(bool((mine.divergence < window.divergence).all()), f"a window does as well: {seen}")
    return seen
