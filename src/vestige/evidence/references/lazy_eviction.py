"""LazyEviction (arXiv 2506.15969): how long entries stay silent, and how long they have been silent before.

Decoding steps are counted t = 1, 2, and so on. For each token, TS is the last step at which it was active, that is,
at which a query of its group gave it a probability of at least alpha, and MRI the longest interval between activations:

    TS = t - 1, MRI = 0                           for the token that enters at t (0, 0 for those of the prompt);
    MRI <- max(MRI, t - TS), then TS <- t         where it is active at t.

Every W steps, W being the observation window, the cache is cut to the budget. The last W tokens stay; of the others
those with the highest score

    I = H1 + H2,   H1 = 2 sigmoid(-(t - TS) / MRI),   H2 = 2 sigmoid(-(MRI - 1)) if MRI > 0 else 0,

t being the last step seen; H1 is its limit where MRI = 0. The prompt's own attention is not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Sight, Trace, follow

__all__ = ["SMALL", "simulate"]

SMALL = {"activity": 0.05, "lag": 3}


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    activity: float,
    lag: int,
    budget: int | float,
    sinks: int,
    recent: int | float,
    when: Literal["decoding"],
    **layer: Any,
) -> Trace:
    """Recurrence. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        activity: alpha.
        lag: W.
    """
    ends = torch.tensor(chunks).cumsum(0).tolist()
    decoded = [end - 1 for end, count in zip(ends, chunks, strict=True) if count == 1 and end > 1]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def recurrence(now: Sight) -> Float[Tensor, " n"]:
        n = now.probability.shape[-1]
        steps = [q for q in decoded if q < n]  # the queries of the steps 1, 2, ...
        score = torch.zeros(n, dtype=torch.float64)
        for k in range(n):
            TS, MRI = sum(q < k for q in steps), 0
            for t, q in enumerate(steps, start=1):
                if q >= k and bool((now.probability[now.group, q, k] >= activity).any()):
                    MRI = max(MRI, t - TS)
                    TS = t
            silence = len(steps) - TS
            H1 = 2 * sigmoid(-silence / MRI) if MRI else (1.0 if silence == 0 else 0.0)
            H2 = 2 * sigmoid(-(MRI - 1)) if MRI else 0.0
            score[k] = H1 + H2
        return score

    most = max(lag, recent) if isinstance(recent, int) else recent
    return follow(
        query, key, value, chunks, recurrence, budget=budget, sinks=sinks, recent=most, when=when, lag=lag, **layer
    )
