"""StreamingLLM (arXiv 2309.17453, section 3.2): the first few tokens, the attention sinks, and a rolling window.

Among the tokens that are neither, the newer ranks above the older, so that what is held is always

    0, ..., sinks - 1   and   n - (budget - sinks) + 1, ..., n.

Positions are counted inside the cache, 0, 1, 2 and so on, whatever was dropped in between. What attention sees of
rotary positions are differences, so this comes to the same as leaving the window where it is in the text and moving
the sinks next to it: on by the number of tokens that are missing between. A sliding window counts so, too. Where
positions are learned vectors, added to the embeddings, they are those of the text.
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
    budget: int | float,
    sinks: int,
    recent: int | float = 0,
    when: Literal["both", "prefill", "decoding"],
    reposition: bool = True,
    frequencies: Float[Tensor, " pairs"] | None = None,
    **layer: Any,
) -> Trace:
    """Sinks and a window. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        reposition: whether positions are counted inside the cache.
    """

    def newness(now: Sight) -> Float[Tensor, " n"]:
        return torch.arange(now.probability.shape[-1], dtype=torch.float64)

    def place(position: int, seen: int, held: int) -> int:
        return position + seen - held if position < sinks else position

    return follow(
        query,
        key,
        value,
        chunks,
        newness,
        budget=budget,
        sinks=sinks,
        recent=recent,
        when=when,
        frequencies=frequencies,
        place=place if reposition and frequencies is not None else None,
        **layer,
    )
