"""Claims of Gated DeltaNet: the delta rule improves on Mamba-2."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase, recalls_more
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def the_delta_rule_improves_on_mamba2(case: LayerCase) -> Seen:
    """Where keys are written anew, it recalls the new values more often than Mamba-2, whose state is no smaller."""
    return recalls_more(case, PairRecall(pairs=4, rewritten=4), "mamba2", "mamba2")
