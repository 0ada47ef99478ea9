"""TOVA (arXiv 2401.06104, section 3.3): token omission via attention.

The score of token k after the queries 1 ... n is what the last of them gave it, averaged over the heads of the layer,

    A_k = 1/H sum_h S_h[n, k],

the same for all heads. Of the tokens with the lowest score as many are omitted as are too many. Grouped heads: the
average is over the query heads of all groups.
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
    """Omission by the last query. See :func:`~vestige.evidence.references.caching.follow` for the arguments."""

    def last_query(now: Sight) -> Float[Tensor, " n"]:
        return now.probability[:, -1].mean(dim=0)

    return follow(query, key, value, chunks, last_query, budget=budget, sinks=sinks, recent=recent, when=when, **layer)
