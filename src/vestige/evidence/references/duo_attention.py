"""DuoAttention (arXiv 2410.10819, sections 2.2 and 2.3).

Of all key-value heads of the model, the given share with the highest gates are retrieval heads and hold every token.
The others are streaming heads: after the token n they hold

    0, ..., sinks - 1   and   n - recent + 1, ..., n.

For the training, head h with gate a_h attends by

    a_h softmax(q K / sqrt d) V + (1 - a_h) softmax(q K' / sqrt d) V',

with K', V' the keys and values of the tokens j of n for which j < sinks or n - j < recent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.context.plan.passkeys import copies
from vestige.evidence.references.caching import Sight, Trace, follow

__all__ = ["gated", "simulate", "small_fit"]


def simulate(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    chunks: Sequence[int],
    *,
    gates: Sequence[Sequence[float]],
    share: float,
    sinks: int,
    recent: int,
    layer: int,
    fitted_on: str = "",
    **rest: Any,
) -> Trace:
    """Retrieval and streaming heads. See :func:`~vestige.evidence.references.caching.follow` for the other arguments.

    Args:
        gates: of each layer's key-value heads.
        share: of the heads that hold every token.
        layer: which layer this is.
    """
    ranked = sorted(((-gate, at, head) for at, row in enumerate(gates) for head, gate in enumerate(row)))
    retrieval = {(at, head) for _, at, head in ranked[: round(share * len(ranked))]}

    def rule(n: int) -> list[int]:
        return [n if (layer, head) in retrieval else sinks + recent for head in range(len(key))]

    return follow(query, key, value, chunks, newest, sinks=sinks, rule=rule, **HELD_BY_RULE, **rest)


HELD_BY_RULE: dict[str, Any] = {"budget": 1.0, "recent": 0, "when": "both"}
"""What a rule makes needless: a budget, protected recent tokens, a schedule."""


def newest(now: Sight) -> Float[Tensor, " n"]:
    """A token's position, so that the oldest goes."""
    return torch.arange(now.probability.shape[-1], dtype=torch.float64)


def gated(
    query: Float[Tensor, "heads T dim"],
    key: Float[Tensor, "kv T dim"],
    value: Float[Tensor, "kv T dim"],
    gates: Float[Tensor, " kv"],
    *,
    sinks: int,
    recent: int,
    scaling: float,
) -> Float[Tensor, "heads T dim"]:
    """Attention while the gates are trained."""
    heads, length, _ = query.shape
    group = heads // len(key)
    outputs = []
    for h in range(heads):
        rows = []
        for n in range(length):
            logits = scaling * key[h // group, : n + 1] @ query[h, n]
            full = logits.softmax(dim=0) @ value[h // group, : n + 1]
            near = [j for j in range(n + 1) if j < sinks or n - j < recent]
            streaming = logits[near].softmax(dim=0) @ value[h // group, near]
            gate = gates[h // group]
            rows.append(gate * full + (1 - gate) * streaming)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def small_fit() -> dict[str, Any]:
    """How gates are learnt on a small random model."""
    return {"samples": copies(range(3, 97), 40, 4), "steps": 8, "learning_rate": 0.1}
