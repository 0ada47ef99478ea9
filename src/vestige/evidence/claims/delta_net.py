"""Claims of DeltaNet: what is written anew replaces what stood there."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def what_is_written_anew_replaces_the_old(case: LayerCase) -> Seen:
    """Where every key is written twice, it recalls the new values more often than gated linear attention does."""
    task = PairRecall(pairs=8, rewritten=8)
    mine, gated = case.recall(task), case.recall(task, "gla")
    seen = {"right answers": mine, "of gla": gated}
    expect(min(mine) > max(gated), f"a gate does as well: {seen}")
    return seen
