"""The whole cache: every token attends to all before it, and nothing is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Compact, Sight, Trace, follow

__all__ = ["simulate"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    scaling: float | None = None,
    window: int | None = None,
    compact: Compact | None = None,
    **budgets: Any,
) -> Trace:
    """Plain causal attention, whatever the budgets say.

    See :func:`~vestige.evidence.references.caching.follow` for the arguments.
    """

    def no_rank(now: Sight) -> Float[Tensor, " n"]:
        raise AssertionError("nothing is ever dropped, so nothing is ranked")

    everything = sum(chunks)
    return follow(
        query,
        key,
        value,
        chunks,
        no_rank,
        budget=everything,
        sinks=0,
        recent=0,
        when="both",
        scaling=scaling,
        window=window,
        compact=compact,
    )
