r"""Aaren: softmax attention of a learned query, the same for every token, over all that came so far,

.. math:: s_i = \frac{q \cdot k_i}{\sqrt{d}}, \qquad o_t = \frac{\sum_{i \le t} e^{s_i} v_i}{\sum_{i \le t} e^{s_i}},
    \qquad q = W_q\, \theta ,

written out as the attention that it is, without the recurrence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear

__all__ = ["mix"]


def mix(x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None) -> Float[Tensor, "T hidden"]:
    """Every beginning on its own."""
    heads = heads or place.heads
    q = by_head(linear(weights["query"][None], weights, "q_proj"), heads)[0]
    k, v = (by_head(linear(x, weights, name), heads) for name in ("k_proj", "v_proj"))
    rows = []
    for t in range(len(x)):
        outputs = []
        for h in range(heads):
            share = torch.softmax(k[: t + 1, h] @ q[h] / math.sqrt(q.shape[-1]), 0)
            outputs.append(share @ v[: t + 1, h])
        rows.append(torch.cat(outputs))
    return linear(torch.stack(rows), weights, "o_proj")
