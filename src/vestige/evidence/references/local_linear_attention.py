r"""Local linear attention: the intercept of a weighted ridge regression of values on keys around the query,

.. math:: o_t = a \quad\text{of}\quad \min_{a, B} \sum_{j \le t} w_j\, |a + B (k_j - q_t) - v_j|^2
    + \lambda \Big(\sum_{j \le t} w_j\Big) |B|_F^2, \qquad w_j = e^{q_t \cdot k_j / \sqrt{d}} ,

with the intercept free. Its normal equations are set up and solved for each query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, linear
from vestige.evidence.references.softmax import projected

__all__ = ["estimate", "mix"]


def estimate(
    q: Float[Tensor, " dim"], k: Float[Tensor, "T dim"], v: Float[Tensor, "T width"], ridge: float
) -> Float[Tensor, " width"]:
    """The value of the fitted line at ``q``."""
    w = torch.exp(k @ q / math.sqrt(len(q)))
    w = w / w.sum()  # a common factor of weights and ridge changes nothing
    design = torch.cat([torch.ones(len(k), 1, dtype=k.dtype), k - q], 1)
    penalty = ridge * torch.ones(len(q) + 1, dtype=k.dtype)
    penalty[0] = 0.0
    normal = design.T @ (w[:, None] * design) + torch.diag(penalty)
    return torch.linalg.solve(normal, design.T @ (w[:, None] * v))[0]


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    ridge: float,
    head_dim: int | None,
    iterations: int,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Query by query, head by head; heads share keys in groups. ``head_dim`` shows in the weights."""
    q, k, v = projected(x, weights, place, **settings)
    group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(len(x)):
        past = slice(0, t + 1)
        rows.append(
            torch.cat([estimate(q[t, h], k[past, h // group], v[past, h // group], ridge) for h in range(q.shape[1])])
        )
    return linear(torch.stack(rows), weights, "o_proj")
