r"""Lizard: with :math:`\phi(u) = [\operatorname{softmax}(W u); \operatorname{softmax}(-W u)]` and one gate per token,

.. math:: \hat y_i = \frac{\sum_{t \le i} \phi_q(q_i) \cdot \phi_k(k_t) \prod_{l=t+1}^{i} \gamma_l\, v_t}
    {\sum_{t \le i} \phi_q(q_i) \cdot \phi_k(k_t) \prod_{l=t+1}^{i} \gamma_l + \epsilon}
    + \alpha\, \frac{\sum_{t > i - w} e^{s_{it}} v_t}{\sum_{t > i - w} e^{s_{it}} + \sum_j e^{m_j}}, \qquad
    \gamma_t = \sigma(W_\gamma x_t + b), \quad s_{it} = \frac{q_i \cdot k_t}{\sqrt{d}} ,

with rotary positions in :math:`s` alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, linear, rotate
from vestige.evidence.references.softmax import projected

__all__ = ["SMALL", "mix"]

SMALL = {"window": 5, "features": 6}


def feature_map(u: Float[Tensor, " dim"], W: Float[Tensor, "dim half"]) -> Float[Tensor, " features"]:
    """Two softmaxes, side by side."""
    return torch.cat([torch.softmax(u @ W, 0), torch.softmax(-(u @ W), 0)])


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    window: int,
    eps: float,
    positions: str,
    theta: float,
    heads: int | None,
    kv_heads: int | None,
    qk_norm: bool,
    **unused: Any,
) -> Float[Tensor, "T hidden"]:
    """Every sum over the past written out, token by token and head by head. Other sizes show in the weights."""
    plain = projected(x, weights, place, heads=heads, kv_heads=kv_heads, positions="none", theta=theta, qk_norm=qk_norm)
    q, k, v = plain
    turned = (rotate(q, theta), rotate(k, theta)) if positions == "rotary" else (q, k)
    gamma = torch.sigmoid(x @ weights["gate"] + weights["gate_bias"])
    group = q.shape[1] // k.shape[1]
    rows = []
    for i in range(len(x)):
        outputs = []
        for h in range(q.shape[1]):
            g = h // group
            asked = feature_map(q[i, h], weights["q_features"])
            far, weight = torch.zeros_like(v[0, g]), torch.zeros((), dtype=x.dtype)
            for t in range(i + 1):
                w = asked @ feature_map(k[t, g], weights["k_features"]) * gamma[t + 1 : i + 1].prod()
                far, weight = far + w * v[t, g], weight + w
            first = max(0, i - window + 1)
            e = torch.exp(turned[1][first : i + 1, g] @ turned[0][i, h] / math.sqrt(q.shape[-1]))
            near = e @ v[first : i + 1, g] / (e.sum() + torch.exp(weights["meta"][h]).sum())
            outputs.append(far / (weight + eps) + weights["share"] * near)
        rows.append(torch.cat(outputs))
    return linear(torch.stack(rows), weights, "o_proj")
