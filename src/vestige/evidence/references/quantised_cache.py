"""A quantised cache (KIVI, arXiv 2402.02750, section 3, by token): old keys and values in b bits.

The channels of a key or value are cut into groups, as equal as can be. With z the smallest value of a group and s the
largest less z, divided by 2^b - 1, both rounded to half precision, a value x is held as z + s c with

    c = round((x - z) / s), between 0 and 2^b - 1.

An entry is rounded when it leaves the window of the last w held. Which tokens are held is another policy's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references import reference_of
from vestige.evidence.references.caching import Trace

__all__ = ["SMALL", "simulate"]

SMALL = {"policy": {"name": "h2o", "budget": 12, "sinks": 1, "recent": 2}, "full_width": 4, "group": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    policy: Any,
    bits: int,
    group: int,
    full_width: int,
    **layer: Any,
) -> Trace:
    """One layer.

    Args:
        policy: says which tokens are held.
        bits: b.
        group: channels of a group at most.
        full_width: w.
        query, key, value, chunks, layer: as in :func:`~vestige.evidence.references.caching.follow`.
    """
    keys, values = key.double().clone(), value.double().clone()
    old: list[set[int]] = [set() for _ in key]

    def rounded(x: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        held, groups = [], math.ceil(len(x) / group)
        for part in x.split(math.ceil(len(x) / groups)):
            z = part.min().half().double()
            s = ((part.max() - z) / (2**bits - 1)).half().double()
            c = ((part - z) / s).round().clamp(0, 2**bits - 1) if s > 0 else torch.zeros_like(part)
            held.append(z + s * c)
        return torch.cat(held)

    def compact(head: int, held: Sequence[int], asked: int) -> tuple[Tensor, Tensor]:
        now = set(held[:-full_width])
        for p in now - old[head]:
            keys[head, p], values[head, p] = rounded(keys[head, p]), rounded(values[head, p])
        old[head] = now
        return keys[head], values[head]

    module = reference_of(policy.name)
    assert module is not None
    parameters = {name: getattr(policy, name) for name in policy.parameters()}
    return module.simulate(query, key, value, chunks, compact=compact, **parameters, **layer)
