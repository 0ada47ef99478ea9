r"""Titans, memory as a gate: :math:`o_t = W_o (n(y_t) \odot \operatorname{SiLU}(n(M_t(q_t))))`, with :math:`y`
the attention within a window and over persistent tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import memories, projected
from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, rotate, silu

__all__ = ["SMALL", "combined", "mix", "seen_by"]

SMALL = {"refresh": 4, "expand": 2, "window": 5, "persistent": 2}


def seen_by(
    x: Float[Tensor, "T hidden"], weights: Weights, heads: int, theta: float, window: int
) -> Float[Tensor, "T hidden"]:
    """Attention to the last tokens, whose keys are turned by their positions, and to tokens that stand nowhere."""
    names = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    q, k, v = (by_head(linear(x, weights, name), heads) for name in names)
    pk, pv = (by_head(linear(weights["attention.persistent"], weights, name), heads) for name in names[1:])
    turned_q, turned_k = rotate(q, theta), rotate(k, theta)
    rows = []
    for t in range(len(x)):
        first = max(0, t - window + 1)
        outputs = []
        for h in range(heads):
            score = torch.cat([pk[:, h] @ q[t, h], turned_k[first : t + 1, h] @ turned_q[t, h]])
            weight = torch.exp(score / q.shape[-1] ** 0.5)
            outputs.append(weight @ torch.cat([pv[:, h], v[first : t + 1, h]]) / weight.sum())
        rows.append(torch.cat(outputs))
    return torch.stack(rows)


def combined(y: Tensor, read: Float[Tensor, "T heads dim"], weights: Weights, eps: float) -> Tensor:
    """Attention's part, gated by the memory's."""
    gate = silu(rms_norm(read.flatten(1), weights["read_norm.weight"], eps))
    return linear(rms_norm(y, weights["seen_norm.weight"], eps) * gate, weights, "o_proj")


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    conv: int,
    expand: int,
    momentum: bool,
    window: int,
    persistent: int,
    theta: float,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Widths and the number of persistent tokens show in the weights."""
    heads = heads or place.heads
    gates = ("alpha", "theta", "eta") if momentum else ("alpha", "theta")
    read = memories(x, *projected(x, weights, heads, conv), weights, gates=gates, **settings)
    return combined(seen_by(x, weights, heads, theta, window), read, weights, place.eps)
