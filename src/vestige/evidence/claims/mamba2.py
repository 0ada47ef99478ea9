"""Claims of Mamba-2: a state that chooses what to keep."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def the_last_word_counts(case: LayerCase) -> Seen:
    """Where keys are written anew, the new value is recalled more often than by linear attention, which cannot tell."""
    task = PairRecall(pairs=4, rewritten=4)
    mine, plain = case.recall(task, steps=300), case.recall(task, "linear-attention", steps=300)
    seen = {"right answers": mine, "of linear attention": plain}
    expect(min(mine) > max(plain), f"linear attention does as well: {seen}")
    return seen
