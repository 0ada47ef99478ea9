r"""HGRN2:

.. math:: f_t = b + (1 - b)\,\sigma(W_f x_t), \quad S_t = \operatorname{diag}(f_t) S_{t-1} + (1 - f_t) v_t^\top, \quad
    o_t = S_t^\top q_t, \quad q_t = \operatorname{SiLU}(W_q x_t), \quad y_t = W_o \operatorname{RMSNorm}(o_t) ,

with a lower bound :math:`b` per channel, zero in the first layer. What is read is divided by the root of the head's
width, which the norm takes out again but for its epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, silu

__all__ = ["mix"]


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, **unused: Any
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head."""
    heads = heads or place.heads
    bound = torch.sigmoid(weights["bound"]) if "bound" in weights else torch.zeros_like(x[0])
    f = by_head(bound + (1 - bound) * torch.sigmoid(linear(x, weights, "f_proj")), heads)
    q, v = by_head(silu(linear(x, weights, "q_proj")), heads), by_head(linear(x, weights, "i_proj"), heads)
    S = [torch.zeros(f.shape[-1], v.shape[-1], dtype=x.dtype)] * heads
    rows = []
    for t in range(len(x)):
        for h in range(heads):
            S[h] = torch.diag(f[t, h]) @ S[h] + torch.outer(1 - f[t, h], v[t, h])
        read = torch.cat([S[h].T @ q[t, h] for h in range(heads)]) / f.shape[-1] ** 0.5
        rows.append(rms_norm(read, weights["norm.weight"], place.eps))
    return linear(torch.stack(rows), weights, "o_proj")
