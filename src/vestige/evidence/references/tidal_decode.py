"""TidalDecode (arXiv 2410.05076, algorithm 1): positions chosen in one layer are read by the layers that follow.

While decoding token n, a choosing layer attends to everything and leaves, per kv head, the K - 1 tokens of highest

    max over the query heads h of the group of A_h[n, p],

and token n. The layers after it, up to the next that chooses, attend to those tokens only; the layers before the first
that chooses attend to everything. The cache is not corrected here: every key and value stays as it came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace

__all__ = ["SMALL", "simulate"]

SMALL = {"start": 0, "again": None, "correction": 0}


@dataclass(frozen=True)
class Tide(Trace):
    """What happened in a layer, and for each token that was decoded, what each kv head chose."""

    chosen: Mapping[int, list[list[int]]]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    layer: int,
    layers: int,
    below: Mapping[int, Tide],
    budget: int | float,
    start: int,
    again: int | float | None,
    correction: int,
    scaling: float | None = None,
    window: int | None = None,
    **unused: Any,
) -> Trace:
    """One layer.

    Args:
        layer, layers: which layer of how many.
        below: what happened in the layers before.
        budget: K, in tokens or as a share of the tokens seen, rounded up.
        start: first layer that chooses.
        again: layer that chooses anew, or a share of the layers, rounded to the nearest.
        correction: must be 0.
        query, key, value, chunks, scaling, window: as in :func:`~vestige.evidence.references.caching.follow`.
    """
    assert correction == 0
    query, key, value = query.double(), key.double(), value.double()
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    second = round(again * layers) if isinstance(again, float) else again
    choosing = [number for number in (start, second) if number is not None and number >= start]
    output = torch.zeros_like(query)
    attention = torch.zeros(kv_heads, length, length, dtype=torch.float64)
    chosen: dict[int, list[list[int]]] = {}

    begin = 0
    for count in chunks:
        for n in range(begin, begin + count):
            decoding = count == 1 and begin > 0
            K = budget if isinstance(budget, int) else math.ceil(budget * (n + 1))
            everything = list(range(n + 1))
            reads = [everything] * kv_heads
            if decoding and layer > start and layer not in choosing:
                reads = below[max(number for number in choosing if number < layer)].chosen[n]
            chosen[n] = []
            for head in range(kv_heads):
                seen = [p for p in reads[head] if window is None or n - p < window]
                weights = torch.zeros(group, length, dtype=torch.float64)
                for g in range(group):
                    weights[g, seen] = (scaling * key[head, seen] @ query[head * group + g, n]).softmax(dim=0)
                    output[head * group + g, n] = weights[g] @ value[head]
                attention[head, n] = weights.sum(dim=0)
                best = sorted(everything[:-1], key=lambda p: -weights[:, p].max().item())[: K - 1]
                chosen[n].append(everything if n + 1 <= K else [*best, n])
        begin += count
    ends = [sum(chunks[: number + 1]) for number in range(len(chunks))]
    kept = tuple(tuple(tuple(range(end)) for _ in range(kv_heads)) for end in ends)
    return Tide(kept, output, attention, chosen)
