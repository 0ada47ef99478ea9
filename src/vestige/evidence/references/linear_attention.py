r"""Linear attention, as the sum over the past that it is equal to:

.. math:: o_t = \frac{\sum_{s \le t} \phi(q_t)^\top \phi(k_s)\, v_s}{\sum_{s \le t} \phi(q_t)^\top \phi(k_s)},
    \qquad \phi(x) = \operatorname{elu}(x) + 1 .
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear

__all__ = ["mix"]


def feature(x: Tensor) -> Tensor:
    """``x + 1`` where x is positive, else ``e^x``."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, eps: float, **unused: Any
) -> Float[Tensor, "T hidden"]:
    """The weights of the past, added up token by token; ``eps`` is added to their sum."""
    heads = heads or place.heads
    q, k, v = (by_head(linear(x, weights, name), heads) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = feature(q), feature(k)
    rows = []
    for t in range(len(x)):
        weight = torch.einsum("hd,shd->sh", q[t], k[: t + 1])
        total = torch.einsum("sh,shv->hv", weight, v[: t + 1])
        rows.append(total / (weight.sum(0)[:, None] + eps))
    return linear(torch.stack(rows).flatten(1), weights, "o_proj")
