"""LongHeads (arXiv 2402.10685, section 3): chunks are represented, chosen per head, and moved together.

The text is cut into chunks of l tokens. With queries Q, keys K turned to the positions 0 ... l - 1 and values V of a
complete chunk, per query head,

    o = mean over i of (softmax(Q K^T / sqrt d) V)_i,    c = softmax(o K^T / sqrt d) K.

Token n, in chunk t, whose query before any turn is q, scores a chunk by q c (the mean over the query heads that share
keys). With k chunks to attend to it takes all if t < k, else the chunks 0, t - 1 and t and the k - 3 best of the
others. Those stand at positions 0, 1, ... without gaps; the token stands where it falls in its own chunk, and attends
to all before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace, follow, turned

__all__ = ["SMALL", "simulate"]

SMALL = {"chunk": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    budget: int,
    chunk: int,
    frequencies: Float[Tensor, " pairs"] | None,
    scaling: float | None = None,
    window: int | None = None,
    **unused: Any,
) -> Trace:
    """One layer. The chunks in which the tokens come in make no difference.

    Args:
        budget: tokens to attend to; k is how many chunks they hold.
        chunk: l.
        query, key, value, chunks, frequencies, scaling, window: as in
            :func:`~vestige.evidence.references.caching.follow`.
    """
    query, key, value = query.double(), key.double(), value.double()
    heads, T, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    plain = follow(
        query,
        key,
        value,
        chunks,
        lambda sight: torch.zeros(T),
        budget=T,
        sinks=0,
        recent=0,
        when="both",
        scaling=scaling,
        window=window,
    )
    if window is not None:
        return plain
    k = budget // chunk

    def moved(states: Float[Tensor, "n dim"], by: Sequence[int]) -> Float[Tensor, "n dim"]:
        return states if frequencies is None else turned(states, by, frequencies)

    represented = torch.zeros(heads, T // chunk, dim, dtype=torch.float64)
    for h in range(heads):
        for number in range(T // chunk):
            own = range(number * chunk, (number + 1) * chunk)
            back = [-number * chunk] * chunk
            Q, V = moved(query[h, own], back), value[h // group, own]
            K = moved(key[h // group, own], back)
            o = ((scaling * Q @ K.T).softmax(dim=1) @ V).mean(dim=0)
            represented[h, number] = (scaling * K @ o).softmax(dim=0) @ K

    output, attention = plain.output.clone(), plain.attention.clone()
    for n in range(k * chunk, T):
        t = n // chunk
        for head in range(kv_heads):
            sharing = range(head * group, (head + 1) * group)
            q = torch.stack([moved(query[h, n : n + 1], [-n])[0] for h in sharing])
            score = torch.stack([represented[h] @ q[g] for g, h in enumerate(sharing)]).mean(dim=0)
            best = sorted(range(1, t - 1), key=lambda number: -float(score[number]))[: k - 3]
            chosen = sorted([0, *best, t - 1, t])
            read = [p for number in chosen for p in range(number * chunk, min((number + 1) * chunk, n + 1))]
            K = moved(key[head, read], [place - p for place, p in enumerate(read)])
            attention[head, n] = 0
            for g, h in enumerate(sharing):
                there = moved(q[g : g + 1], [len(read) - 1])[0]
                share = (scaling * K @ there).softmax(dim=0)
                output[h, n] = share @ value[head, read]
                attention[head, n, read] += share
    return Trace(plain.kept, output, attention)
