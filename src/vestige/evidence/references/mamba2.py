r"""Mamba-2: per head a state-space model with a scalar transition,

.. math:: h_t = e^{-e^{a} \Delta_t} h_{t-1} + \Delta_t B_t x_t^\top, \quad y_t = h_t^\top C_t + D x_t, \quad
    \Delta_t = \log(1 + e^{W_\Delta u_t + b}) ,

where x, B and C come out of a short convolution of the input u, and
:math:`W_o \operatorname{RMSNorm}(y_t \odot \operatorname{SiLU}(W_g u_t))` goes out, normalised per group.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, short_convolution, silu, softplus

__all__ = ["SMALL", "mix"]

SMALL = {"head_dim": 8, "state": 16}


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    head_dim: int,
    state: int,
    groups: int,
    **unused: Any,
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head. Other widths show in the weights."""
    inner = weights["o_proj.weight"].shape[1]
    heads = inner // head_dim
    mixed = short_convolution(linear(x, weights, "in_proj"), weights["conv.weight"], weights["conv.bias"])
    value, b, c = mixed.split([inner, groups * state, groups * state], -1)
    value, b, c = by_head(value, heads), by_head(b, groups), by_head(c, groups)
    dt = softplus(linear(x, weights, "dt_proj") + weights["dt_bias"])
    h = [torch.zeros(state, head_dim, dtype=x.dtype)] * heads
    rows = []
    for t in range(len(x)):
        outputs = []
        for n in range(heads):
            group = n * groups // heads
            fade = torch.exp(-torch.exp(weights["a_log"][n]) * dt[t, n])
            h[n] = fade * h[n] + dt[t, n] * torch.outer(b[t, group], value[t, n])
            outputs.append(h[n].T @ c[t, group] + weights["skip"][n] * value[t, n])
        rows.append(torch.cat(outputs))
    gated = torch.stack(rows) * silu(linear(x, weights, "g_proj"))
    normed = rms_norm(gated.reshape(len(x), groups, -1), 1.0, place.eps).flatten(1) * weights["norm"]
    return linear(normed, weights, "o_proj")
