"""A2SF (arXiv 2407.20485, section 3): accumulated attention with a forgetting factor.

The score of token k after the queries 1 ... n is

    A_k = sum_q alpha^(n - q) S[q, k],

with S[q, k] the probability that query q gave to token k and alpha the forgetting factor. The plain sum, alpha = 1,
favours old tokens: causal masking lets more queries see them. A power of alpha makes the sum of what any token can
gather finite, at most 1 / (1 - alpha) per query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
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
    forgetting: float,
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["both", "prefill", "decoding"],
    **layer: Any,
) -> Trace:
    """Decayed attention. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        forgetting: alpha, by which a score is multiplied once per query.
    """

    def decayed(now: Sight) -> Float[Tensor, " n"]:
        S = now.attention
        n = S.shape[0]
        power = forgetting ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
        return power @ S

    return follow(query, key, value, chunks, decayed, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
