"""SnapKV (arXiv 2404.14469, section 4.2): voting by an observation window, and clustering by pooling.

With w queries in the window, the last of the chunk that came last, token k before the window gets the votes

    V_k = sum_{q > n - w} S[q, k],

and its score is the average (or the largest) of the votes of the tokens k - r, ..., k + r, with kernel size 2r + 1.
Beyond the text and inside the window there are no votes; an average divides by the whole kernel nevertheless. The
tokens of the window stay. Grouped heads: S is summed over the query heads of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Sight, Trace, follow

__all__ = ["SMALL", "simulate"]

SMALL = {"window_size": 3, "kernel_size": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    window_size: int,
    kernel_size: int,
    pooling: Literal["average", "max"],
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["prefill"],
    **layer: Any,
) -> Trace:
    """Votes of the window. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        window_size: w, the queries that vote (all of the chunk, where it has fewer).
        kernel_size: 2r + 1.
        pooling: average or largest.
    """
    ends = torch.tensor(chunks).cumsum(0).tolist()

    def votes(now: Sight) -> Float[Tensor, " n"]:
        S = now.attention
        n = S.shape[0]
        start = n - min(window_size, chunks[ends.index(n)])
        r = kernel_size // 2
        V = torch.zeros(n + 2 * r, dtype=torch.float64)
        before = max(0, n - window_size)
        V[r : r + before] = S[start:, :before].sum(dim=0)
        around = V.unfold(0, kernel_size, 1)
        score = around.sum(dim=1) / kernel_size if pooling == "average" else around.max(dim=1).values
        score[before:] = float("inf")
        return score

    return follow(query, key, value, chunks, votes, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
