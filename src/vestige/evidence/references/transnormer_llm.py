r"""TransNormerLLM's token mixer: lightning attention's sum with the gate of the paper,

.. math:: y_t = W_o\,(\operatorname{SRMSNorm}(o_t) \odot W_u x_t), \qquad
    \operatorname{SRMSNorm}(x) = \frac{x}{\lVert x \rVert_2 / \sqrt{d} + \epsilon} ,

queries and keys through SiLU, values as they are. With LRPE, the product of a query and a key is
:math:`\sum_j q_{tj} k_{sj} \cos(\theta_j (t - s))`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.lightning_attention import decays
from vestige.evidence.references.mixing import Weights, by_head, linear, silu

__all__ = ["mix"]


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, slopes: str, **unused: Any
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head. Whether the layer has LRPE shows in the weights."""
    heads = heads or place.heads
    q, k = (by_head(silu(linear(x, weights, name)), heads) for name in ("q_proj", "k_proj"))
    v = by_head(linear(x, weights, "v_proj"), heads)
    theta = weights.get("speed", torch.zeros_like(q[0]))
    decay = decays(heads, place, slopes)
    rows = []
    for t in range(len(x)):
        outputs = []
        for h in range(heads):
            read = torch.zeros_like(v[0, 0])
            for s in range(t + 1):
                product = torch.sum(q[t, h] * k[s, h] * torch.cos(theta[h] * (t - s)))
                read = read + decay[h] ** (t - s) * product * v[s, h]
            outputs.append(read)
        rows.append(torch.cat(outputs))
    read = torch.stack(rows)
    normed = read / (read.norm(dim=-1, keepdim=True) / read.shape[-1] ** 0.5 + place.eps)
    return linear(normed * linear(x, weights, "u_proj"), weights, "o_proj")
