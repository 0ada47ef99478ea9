r"""DeltaNet:

.. math:: S_t = (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top, \qquad o_t = S_t^\top q_t / \sqrt{d_k},
    \qquad y_t = W_o \operatorname{RMSNorm}(o_t) .

Queries, keys and values pass a short convolution and SiLU; queries and keys are then brought to length one; the rate is
:math:`\beta_t = \sigma(W_b x_t)`, or twice that.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, short_convolution, silu

__all__ = ["delta_rule", "mix", "projected"]


def projected(
    x: Float[Tensor, "T hidden"], weights: Weights, heads: int, conv: int, negative: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and rates by head."""
    parts = [linear(x, weights, name) for name in ("q_proj", "k_proj", "v_proj")]
    if conv:
        taps = weights["conv.weight"].split([part.shape[-1] for part in parts])
        q, k, v = (short_convolution(part, tap) for part, tap in zip(parts, taps, strict=True))
    else:
        q, k, v = (silu(part) for part in parts)
    q, k, v = by_head(q, heads), by_head(k, heads), by_head(v, heads)
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    return q, k, v, torch.sigmoid(linear(x, weights, "b_proj")) * (2 if negative else 1)


def delta_rule(
    q: Float[Tensor, "T heads keys"],
    k: Float[Tensor, "T heads keys"],
    v: Float[Tensor, "T heads values"],
    beta: Float[Tensor, "T heads"],
    alpha: Float[Tensor, "T heads"],
) -> Float[Tensor, "T heads values"]:
    """The recurrence; ``alpha`` lets the whole state fade."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    S = [torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype)] * k.shape[1]
    rows = []
    for t in range(len(q)):
        for h in range(k.shape[1]):
            erase = eye - beta[t, h] * torch.outer(k[t, h], k[t, h])
            S[h] = alpha[t, h] * erase @ S[h] + beta[t, h] * torch.outer(k[t, h], v[t, h])
        rows.append(torch.stack([S[h].T @ q[t, h] for h in range(k.shape[1])]))
    return torch.stack(rows) / k.shape[-1] ** 0.5


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    conv: int,
    negative: bool,
    **unused: Any,
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head. Widths show in the weights."""
    q, k, v, beta = projected(x, weights, heads or place.heads, conv, negative)
    read = delta_rule(q, k, v, beta, torch.ones_like(beta))
    return linear(rms_norm(read, weights["norm.weight"], place.eps).flatten(1), weights, "o_proj")
