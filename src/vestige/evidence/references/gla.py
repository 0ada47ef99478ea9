r"""Gated linear attention:

.. math:: S_t = \operatorname{diag}(\alpha_t) S_{t-1} + k_t v_t^\top, \quad o_t = S_t^\top q_t / \sqrt{d_k}, \quad
    \alpha_t = \sigma(W_2 W_1 x_t + b)^{1/\tau}, \quad
    y_t = W_o\,(\operatorname{RMSNorm}(o_t) \odot \operatorname{SiLU}(W_g x_t)) .
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, silu

__all__ = ["mix"]


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, temperature: float, **unused: Any
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head. Widths show in the weights."""
    heads = heads or place.heads
    q, k, v, g = (by_head(linear(x, weights, name), heads) for name in ("q_proj", "k_proj", "v_proj", "g_proj"))
    low = linear(x, weights, "decay.0")
    alpha = by_head(torch.sigmoid(linear(low, weights, "decay.1")), heads) ** (1 / temperature)
    S = [torch.zeros(k.shape[-1], v.shape[-1], dtype=x.dtype)] * heads
    rows = []
    for t in range(len(x)):
        outputs = []
        for h in range(heads):
            S[h] = torch.diag(alpha[t, h]) @ S[h] + torch.outer(k[t, h], v[t, h])
            o = S[h].T @ q[t, h] / k.shape[-1] ** 0.5
            outputs.append(rms_norm(o, weights["norm.norm.weight"], place.eps) * silu(g[t, h]))
        rows.append(torch.cat(outputs))
    return linear(torch.stack(rows), weights, "o_proj")
