"""MoA (arXiv 2406.14909, sections 3 and 4).

After N tokens a head with the rule (alpha, beta) holds the first ``sinks`` and the last

    max(recent, floor(alpha + beta N)).

How much a head's sight is worth: with A the attention of a query head, o_i = sum_j A_ij v_j its output and L the loss,
taking entry j from row i, the others scaled up to one again, changes the output to (o_i - A_ij v_j) / (1 - A_ij), by

    A_ij (o_i - v_j) / (1 - A_ij),

and so the loss, to first order, by E_ij = dL/do_i . A_ij (o_i - v_j) / (1 - A_ij). The query heads of a key-value head
lose the entry together. A window of w tokens loses the entries at the distances d = i - j >= w, at the cost of
sum_i |E_{i, i-d}| each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.context.plan.passkeys import copies
from vestige.evidence.references.caching import Trace, follow
from vestige.evidence.references.duo_attention import HELD_BY_RULE, newest

__all__ = ["by_distance", "simulate", "small_fit"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    alpha: Sequence[Sequence[float]],
    beta: Sequence[Sequence[float]],
    sinks: int,
    recent: int,
    layer: int,
    density: float = 0.5,
    fitted_on: str = "",
    **rest: Any,
) -> Trace:
    """Elastic windows. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        alpha, beta: the rule of each layer's key-value heads.
        layer: which layer this is.
    """

    def rule(n: int) -> list[int]:
        pairs = zip(alpha[layer], beta[layer], strict=True)
        return [sinks + max(recent, math.floor(a + b * n)) for a, b in pairs]

    return follow(query, key, value, chunks, newest, sinks=sinks, rule=rule, **HELD_BY_RULE, **rest)


def by_distance(
    attention: Float[Tensor, "group n n"],
    value: Float[Tensor, "n dim"],
    gradient: Float[Tensor, "group n dim"],
    sinks: int,
) -> Float[Tensor, " n"]:
    """What the entries at each distance are worth to a key-value head, by the gradient with respect to its outputs."""
    n = len(value)
    worth = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        for j in range(sinks, i + 1):
            change = 0.0
            for A, g in zip(attention, gradient, strict=True):
                o = A[i] @ value
                change += float(g[i] @ (A[i, j] * (o - value[j]) / (1 - A[i, j])))
            worth[i - j] += abs(change)
    return worth


def small_fit() -> dict[str, Any]:
    """How rules are chosen on a small random model."""
    return {"samples": copies(range(3, 97), 60, 2) + copies(range(3, 97), 120, 2)}
