"""Claims of DuoAttention: the heads whose gates stay open are those that copy from far back."""

from __future__ import annotations

import random

import torch

from vestige.context.evict.full import Full
from vestige.context.plan.windows import Table
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import copying_loss, planned
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

NARROW = {"sinks": 4, "recent": 60}  # for passages of 256 tokens


@claim(slow=True)
def half_the_heads_copy_like_all(case: CacheCase) -> Seen:
    """With half of the heads at sinks and recent tokens, text from far back is copied about as with the whole cache;
    with gates dealt out at random it is not."""
    plan = planned(case, **NARROW, share=0.5)
    mine, whole = copying_loss(case, plan), copying_loss(case, Full())
    dealt = torch.stack([copying_loss(case, plan.replace(gates=_shuffled(plan.gates, seed))) for seed in case.seeds])
    seen = {"loss": mine.tolist(), "whole cache": whole.tolist(), "gates at random": dealt.mean(dim=1).tolist()}
    gap = mine.mean() - whole.mean()
    expect(float(gap) < 0.25 * float(dealt.mean() - whole.mean()), f"the gates say little: {seen}")
    expect(bool((dealt.mean(dim=1) > mine.mean()).all()), f"gates at random do as well: {seen}")
    return seen


def _shuffled(values: Table, seed: int) -> Table:
    flat = [value for row in values for value in row]
    random.Random(seed).shuffle(flat)
    width = len(values[0])
    return tuple(tuple(flat[first : first + width]) for first in range(0, len(flat), width))
