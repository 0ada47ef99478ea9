"""RazorAttention (arXiv 2407.15891, section 3.2), for models with rotary positions.

A text is a start token and P random tokens, R times over. With A the attention of a query head, start token left out,
and i a token of the second or a later repeat,

    echo(i)      = sum over r >= 1, i - r P >= 0 of A[i, i - r P],
    induction(i) = sum over r >= 1, i - r P >= 0 of A[i, i - r P + 1];

a head's scores are the means over i, a key-value head's the highest of its query heads. The heads that lead by
induction, and those that lead by echo, hold every token. Another head, after N tokens, holds the first ``sinks`` and
the last max(recent, N / compression), and for the set D that it dropped, the mean key and value, counted |D| times:

    o = (|D| exp(q k_D) v_D + sum_n exp(q k_n) v_n) / (|D| exp(q k_D) + sum_n exp(q k_n)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.caching import Trace, follow
from vestige.evidence.references.duo_attention import HELD_BY_RULE, newest

__all__ = ["looks", "simulate"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    induction: Sequence[Sequence[float]],
    echo: Sequence[Sequence[float]],
    induction_share: float,
    echo_share: float,
    sinks: int,
    recent: int,
    compression: float,
    compensate: bool,
    layer: int,
    fitted_on: str = "",
    **rest: Any,
) -> Trace:
    """Heads that copy, and others. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        induction, echo: scores of each layer's key-value heads.
        induction_share, echo_share: of the heads that hold every token.
        compression: of how many tokens a head's window is one.
        compensate: whether what is dropped leaves its mean.
        layer: which layer this is.
    """
    whole = _leading(induction, induction_share) | _leading(echo, echo_share)

    def rule(n: int) -> list[int]:
        window = max(recent, math.ceil(n / compression))
        return [n if (layer, head) in whole else sinks + window for head in range(len(key))]

    return follow(
        query, key, value, chunks, newest, sinks=sinks, rule=rule, stand_ins=compensate, **HELD_BY_RULE, **rest
    )


def _leading(scores: Sequence[Sequence[float]], share: float) -> set[tuple[int, int]]:
    ranked = sorted((-score, at, head) for at, row in enumerate(scores) for head, score in enumerate(row))
    return {(at, head) for _, at, head in ranked[: round(share * len(ranked))]}


def looks(attention: Float[Tensor, "n n"], period: int) -> tuple[float, float]:
    """Echo and induction of one head, from its attention without the start token."""
    echo = induction = 0.0
    asked = range(period, len(attention))
    for i in asked:
        for j in range(i - period, -1, -period):
            echo += float(attention[i, j])
            induction += float(attention[i, j + 1])
    return echo / len(asked), induction / len(asked)
