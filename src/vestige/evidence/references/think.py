"""ThinK (arXiv 2407.21018, section 3): old keys keep the channels that matter to the queries.

With Q the last queries and K the keys that are held when the first of them leaves the window of recent tokens, a kv
head keeps for good the channels i of the largest

    ||Q_i|| ||K_i||,

(1 - lambda) d of them, rounded up; the query heads of the group count together. From then on a key that has left the
window of the last w held has the other channels zero. Logits are scaled as ever. Which tokens are held is another
policy's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references import reference_of
from vestige.evidence.references.caching import Trace

__all__ = ["SMALL", "simulate"]

SMALL = {"policy": {"name": "h2o", "budget": 12, "sinks": 1, "recent": 2}, "full_width": 4, "queries": 8}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    policy: Any,
    ratio: float,
    queries: int,
    full_width: int,
    **layer: Any,
) -> Trace:
    """One layer.

    Args:
        policy: says which tokens are held.
        ratio: lambda.
        queries: how many of the last queries are Q.
        full_width: w.
        query, key, value, chunks, layer: as in :func:`~vestige.evidence.references.caching.follow`.
    """
    heads, _, dim = query.shape
    group = heads // key.shape[0]
    thin, values = key.double().clone(), value.double()
    old: list[set[int]] = [set() for _ in key]
    dropped: dict[int, list[int]] = {}

    def compact(head: int, held: Sequence[int], asked: int) -> tuple[Tensor, Tensor]:
        wide = [p for p in held if p not in old[head]]
        while len(wide) > full_width:
            if head not in dropped:
                Q = query.double()[head * group : (head + 1) * group, max(0, asked - queries) : asked].flatten(0, 1)
                K = thin[head, held]
                weight = Q.norm(dim=0) * K.norm(dim=0)
                dropped[head] = weight.argsort()[: int(ratio * dim)].tolist()
            thin[head, wide[0], dropped[head]] = 0
            old[head].add(wide.pop(0))
        return thin[head], values[head]

    module = reference_of(policy.name)
    assert module is not None
    parameters = {name: getattr(policy, name) for name in policy.parameters()}
    return module.simulate(query, key, value, chunks, compact=compact, **parameters, **layer)
