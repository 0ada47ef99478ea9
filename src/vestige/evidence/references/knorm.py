"""Key norm (arXiv 2406.11430, section 3): the score of token k is -|k|, the norm of its key with the sign turned."""

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
    """Short keys. See :func:`~vestige.evidence.references.caching.follow` for the arguments."""

    def shortness(now: Sight) -> Float[Tensor, " n"]:
        return -key[now.head].double().square().sum(dim=-1).sqrt()

    return follow(query, key, value, chunks, shortness, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
