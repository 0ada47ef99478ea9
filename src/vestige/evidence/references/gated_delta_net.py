r"""Gated DeltaNet: the delta rule on a state that fades,

.. math:: S_t = \alpha_t (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top, \qquad
    \alpha_t = \exp(-e^{a} \log(1 + e^{W_a x_t + b})), \qquad
    y_t = W_o\,(\operatorname{RMSNorm}(o_t) \odot \operatorname{SiLU}(W_g x_t)) .

Queries, keys, values and rates are DeltaNet's.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.delta_net import delta_rule, projected
from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, silu, softplus

__all__ = ["mix"]


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
    heads = heads or place.heads
    q, k, v, beta = projected(x, weights, heads, conv, negative)
    rate = torch.exp(weights["a_log"]) * softplus(linear(x, weights, "a_proj") + weights["dt_bias"])
    read = delta_rule(q, k, v, beta, torch.exp(-rate))
    gate = silu(by_head(linear(x, weights, "g_proj"), heads))
    return linear((rms_norm(read, weights["norm.norm.weight"], place.eps) * gate).flatten(1), weights, "o_proj")
