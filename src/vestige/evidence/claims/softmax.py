"""Claims of softmax attention: it keeps everything apart."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase, recalls_more
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def many_things_stay_apart(case: LayerCase) -> Seen:
    """Of two dozen pairs it recalls nearly all, where linear attention, whose state is one matrix, mixes them up."""
    return recalls_more(case, PairRecall(pairs=24, keys=24), "linear-attention", "linear attention", by=0.3)
