"""Claims of sparse state expansion: more state than the weights that fill it, and little of it touched."""

from __future__ import annotations

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall
from vestige.layers.mixers.gla import GLA


@claim(slow=True)
def partitions_hold_what_one_state_cannot(case: LayerCase) -> Seen:
    """Of 16 pairs many more are recalled than by gated linear attention with keys of the same width."""
    task, chunk = PairRecall(pairs=16, keys=16), 32
    mine = case.recall(task, case.method.replace(chunk=chunk))
    theirs = case.recall(task, GLA(expand_k=case.method.expand_k, expand_v=case.method.expand_v, chunk=chunk))
    seen = {"right answers": mine, "of gated linear attention": theirs, "chance": task.chance}
    expect(min(mine) > max(theirs) + 0.2, f"gated linear attention does nearly as well: {seen}")
    return seen
