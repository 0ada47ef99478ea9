"""Recycled attention (arXiv 2411.05787, section 3): full steps once in a while, a small cache in between.

A full step of token t gives each token p, per kv head, the weight

    s_p = max over the query heads h of the group of A_h[t, p],

and the small cache is the K tokens of highest weight. In the steps that follow, each new token displaces the token of
lowest weight (those that came since the full step go last, in the order in which they came) and attends to the
small cache, itself included. With a stride S, every S-th step is full. With a threshold s, every S-th step is full
where cos(q, q') <= s, for q the mean over the heads of the token's query and q' that of the last full step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace

__all__ = ["SMALL", "simulate"]

SMALL = {"stride": 4, "pool": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    budget: int | float,
    stride: int,
    similarity: float | None,
    pool: int,
    scaling: float | None = None,
    window: int | None = None,
    **unused: Any,
) -> Trace:
    """Full and partial steps.

    Args:
        budget: K, in tokens or as a share of the tokens seen at a full step, rounded up.
        stride: S.
        similarity: s; none for a full step at every S-th step.
        pool: a token's weight is the largest of this many neighbours', itself in the middle.
        query, key, value, chunks, scaling, window: as in :func:`~vestige.evidence.references.caching.follow`.
    """
    query, key, value = query.double(), key.double(), value.double()
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    output = torch.zeros_like(query)
    attention = torch.zeros(kv_heads, length, length, dtype=torch.float64)
    small: list[dict[int, float]] = [{} for _ in range(kv_heads)]  # weight by position
    places = 0
    reference = torch.zeros(dim, dtype=torch.float64)

    def attend(n: int, head: int, positions: list[int]) -> Float[Tensor, "group n"]:
        seen = [p for p in positions if window is None or n - p < window]
        weights = torch.zeros(group, length, dtype=torch.float64)
        for g in range(group):
            weights[g, seen] = (scaling * key[head, seen] @ query[head * group + g, n]).softmax(dim=0)
            output[head * group + g, n] = weights[g] @ value[head]
        attention[head, n] = weights.sum(dim=0)
        return weights

    def full(n: int, choose: bool) -> None:
        nonlocal places, reference
        for head in range(kv_heads):
            s = attend(n, head, list(range(n + 1))).amax(dim=0)
            if choose:
                places = budget if isinstance(budget, int) else math.ceil(budget * (n + 1))
                near = [s[max(0, p - pool // 2) : p + pool // 2 + 1].max().item() for p in range(n + 1)]
                best = sorted(range(n + 1), key=lambda p: -near[p])[:places]
                small[head] = {p: near[p] for p in best}
                reference = query[:, n].mean(dim=0)

    def partial(n: int, turn: int) -> None:
        for head in range(kv_heads):
            if len(small[head]) == places:
                del small[head][min(small[head], key=small[head].__getitem__)]
            small[head][n] = 1.0 + turn  # no weight is above one
            attend(n, head, list(small[head]))

    start = turn = 0
    for count in chunks:
        decoding = count == 1 and start > 0
        turn = turn + 1 if decoding else 0
        if not decoding:
            for n in range(start, start + count):
                full(n, choose=n == start + count - 1)
        else:
            due = turn % stride == 0
            if due and similarity is not None:
                cosine = torch.cosine_similarity(query[:, start].mean(dim=0), reference, dim=0)
                due = bool(cosine <= similarity)
            full(start, choose=True) if due else partial(start, turn)
        start += count
    ends = [sum(chunks[: n + 1]) for n in range(len(chunks))]
    kept = tuple(tuple(tuple(range(end)) for _ in range(kv_heads)) for end in ends)
    return Trace(kept, output, attention)
