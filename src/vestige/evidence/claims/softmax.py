"""Claims of softmax attention: it keeps everything apart."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def many_things_stay_apart(case: LayerCase) -> Seen:
    """Of two dozen pairs it recalls nearly all, where linear attention, whose state is one matrix, mixes them up."""
    task = PairRecall(pairs=24, keys=24)
    mine, fixed = case.recall(task), case.recall(task, "linear-attention")
    seen = {"right answers": mine, "of linear attention": fixed}
    expect(min(mine) > max(fixed) + 0.3, f"a state of fixed size does as well: {seen}")
    return seen
