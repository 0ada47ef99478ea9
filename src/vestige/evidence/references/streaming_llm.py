"""StreamingLLM (arXiv 2309.17453, section 3.2): the first few tokens, the attention sinks, and a rolling window.

Among the tokens that are neither, the newer ranks above the older, so that what is held is always

    0, ..., sinks - 1   and   n - (budget - sinks) + 1, ..., n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace, follow

__all__ = ["simulate"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    budget: int | float,
    sinks: int,
    recent: int | float = 0,
    when: Literal["both", "prefill", "decoding"],
    **layer: Any,
) -> Trace:
    """Sinks and a window. See :func:`~vestige.evidence.references.caching.follow` for the arguments."""

    def age(S: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
        return torch.arange(S.shape[1], dtype=torch.float64)

    return follow(query, key, value, chunks, age, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
