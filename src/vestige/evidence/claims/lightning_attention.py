"""Claims of lightning attention: order counts, and a token costs the same at every length."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.mixing import LayerCase, flops_per_token
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def the_last_word_counts(case: LayerCase) -> Seen:
    """Where keys are written anew, the new value is recalled more often than by linear attention, which cannot tell."""
    task = PairRecall(pairs=4, rewritten=4)
    mine, plain = case.recall(task), case.recall(task, "linear-attention")
    seen = {"right answers": mine, "of linear attention": plain}
    expect(min(mine) > max(plain), f"linear attention does as well: {seen}")
    return seen


@claim(slow=True)
def a_token_costs_the_same_at_every_length(case: LayerCase) -> Seen:
    """Read at once, 2048 tokens take as many operations per token as 256 do; softmax attention takes ever more."""
    mine = [flops_per_token(case.method, length) for length in (256, 2048)]
    softmax = [flops_per_token(vestige.method("softmax"), length) for length in (256, 2048)]  # type: ignore[arg-type]
    seen = {"operations per token": mine, "of softmax attention": softmax}
    expect(mine[1] <= 1.02 * mine[0], f"they grow: {seen}")
    expect(softmax[1] > 2 * softmax[0], f"softmax attention's do not grow: {seen}")
    return seen
