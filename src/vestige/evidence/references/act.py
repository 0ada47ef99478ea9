"""ACT (arXiv 2406.15765, section 4): attention sinks beyond the first token, found and calibrated.

With A the attention of a query head over a prompt of N tokens, token t > 0 is a sink where

    sum over i >= t of A[i, t] / (N - t) > alpha / N   (or a fixed threshold).

In each row, the attention on the sinks is multiplied by beta; what that sets free is shared out among the other tokens
in proportion to their attention. A chunk of the prompt finds its sinks with the queries of all chunks so far, so that
N is the number of tokens so far; tokens decoded after it have the same sinks, and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace

__all__ = ["SMALL", "simulate"]

SMALL = {"alpha": 2.0, "heads": ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3))}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    layer: int,
    layers: int,
    beta: float,
    alpha: float,
    threshold: float | None,
    heads: Sequence[tuple[int, int]] | None,
    scaling: float | None = None,
    window: int | None = None,
    **unused: Any,
) -> Trace:
    """One layer.

    Args:
        layer, layers: which layer of how many.
        beta, alpha, threshold: as above.
        heads: layers and query heads that are calibrated; none: all, but those of the first two layers and the last.
        query, key, value, chunks, scaling, window: as in :func:`~vestige.evidence.references.caching.follow`.
    """
    query, key, value = query.double(), key.double(), value.double()
    count, T, dim = query.shape
    group = count // key.shape[0]
    scaling = dim**-0.5 if scaling is None else scaling
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    A = (scaling * query @ key.repeat_interleave(group, 0).mT).masked_fill(~seen, float("-inf")).softmax(dim=-1)
    inner = 2 <= layer < layers - 1
    chosen = [h for h in range(count) if (inner if heads is None else (layer, h) in [tuple(pair) for pair in heads])]

    for h in chosen:
        sinks: list[int] = []
        asked: list[int] = []
        plain = A[h].clone()
        start = 0
        for number in chunks:
            end = start + number
            if not (number == 1 and start > 0):
                sinks = []
                asked += range(start, end)
                for t in range(1, end):
                    asking = [i for i in asked if i >= t]
                    received = sum(float(plain[i, t]) for i in asking) / max(1, len(asking))
                    if received > (alpha / end if threshold is None else threshold):
                        sinks.append(t)
            for i in range(start, end):
                freed = (1 - beta) * A[h, i, sinks].sum()
                others = [j for j in range(i + 1) if j not in sinks]
                A[h, i, others] += freed * A[h, i, others] / A[h, i, others].sum()
                A[h, i, sinks] *= beta
            start = end
    ends = [sum(chunks[: n + 1]) for n in range(len(chunks))]
    kept = tuple(tuple(tuple(range(end)) for _ in range(key.shape[0])) for end in ends)
    return Trace(kept, A @ value.repeat_interleave(group, 0), A.unflatten(0, (-1, group)).sum(dim=1))
