r"""Based: linear attention whose weights are the second-order Taylor expansion of softmax's exponential,

.. math:: w_{ts} = 1 + \frac{q_t \cdot k_s}{\sqrt{d}} + \frac{1}{2}\left(\frac{q_t \cdot k_s}{\sqrt{d}}\right)^2, \qquad
    o_t = \sum_{s \le t} w_{ts} v_s \Big/ \sum_{s \le t} w_{ts} .
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear

__all__ = ["SMALL", "mix"]

SMALL = {"feature_dim": 3}


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    feature_dim: int,
    eps: float,
    **unused: Any,
) -> Float[Tensor, "T hidden"]:
    """The weights of the past, added up token by token; ``eps`` is added to their sum."""
    heads = heads or place.heads
    q, k, v = (by_head(linear(x, weights, name), heads) for name in ("q_proj", "k_proj", "v_proj"))
    rows = []
    for t in range(len(x)):
        product = torch.einsum("hd,shd->sh", q[t], k[: t + 1]) / feature_dim**0.5
        weight = 1 + product + product**2 / 2
        total = torch.einsum("sh,shv->hv", weight, v[: t + 1])
        rows.append(total / (weight.sum(0)[:, None] + eps))
    return linear(torch.stack(rows).flatten(1), weights, "o_proj")
