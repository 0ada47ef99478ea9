"""Claims of DeltaNet: what is written anew replaces what stood there."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase, recalls_more
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def what_is_written_anew_replaces_the_old(case: LayerCase) -> Seen:
    """Where every key is written twice, it recalls the new values more often than gated linear attention does."""
    return recalls_more(case, PairRecall(pairs=8, rewritten=8), "gla", "gla")
