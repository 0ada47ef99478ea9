"""Claims of StreamingLLM: with the first tokens kept, a window suffices to read on; without them it breaks."""

from __future__ import annotations

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, excess_loss_while_rolling, read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

NEAR = 0.3  # nats per token above the whole cache that still count as near it


@claim(slow=True)
def sinks_keep_the_loss(case: CacheCase) -> Seen:
    """Over a text longer than the cache the loss stays near the whole cache's; with a plain window it does not."""
    sinks = excess_loss_while_rolling(case, case.on_lm(budget=BUDGET))
    window = excess_loss_while_rolling(case, case.on_lm(budget=BUDGET, sinks=0))
    seen = {"excess loss": sinks.tolist(), "of a plain window": window.tolist()}
    expect(float(sinks.mean()) < NEAR, f"the loss is {float(sinks.mean()):.3f} nats above the whole cache's: {seen}")
    expect(bool((window > 2 * sinks.clamp_min(0)).all()), f"a plain window does not do much worse: {seen}")
    return seen


@claim(slow=True)
def sinks_receive_the_attention(case: CacheCase) -> Seen:
    """The few first tokens receive more of later tokens' attention than as many entries more of the window would."""
    sinks = read_on(case, case.method)
    window = read_on(case, case.method.replace(sinks=0))
    seen = {"share of attention kept": sinks.share.tolist(), "by a plain window": window.share.tolist()}
    expect(bool((sinks.share > 1.5 * window.share).all()), f"sinks hold little attention: {seen}")
    return seen
