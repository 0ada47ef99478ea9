"""H2O (arXiv 2306.14048, section 4, algorithm 1): heavy hitters and recent tokens.

The score of token k after the queries 1 ... n is the attention that it has gathered,

    A_k = sum_q S[q, k],

with S[q, k] the probability that query q gave to token k; zero where k was dropped before q came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Sight, Trace, follow

__all__ = ["simulate"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["both", "prefill", "decoding"],
    **layer: Any,
) -> Trace:
    """Heavy hitters. See :func:`~vestige.evidence.references.caching.follow` for the arguments."""

    def gathered(now: Sight) -> Float[Tensor, " n"]:
        S = now.attention
        return S.sum(dim=0)

    return follow(query, key, value, chunks, gathered, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
