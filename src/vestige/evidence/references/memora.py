r"""Memora:

.. math:: A_t = \alpha_t A_{t-1} - \theta_t \nabla \|M(k_t) - v_t\|^2, \qquad W_t = c\,\operatorname{softmax}(A_t)
    \quad\text{for each output} .
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import mix_with
from vestige.evidence.references.mixing import Weights

__all__ = ["SMALL", "mix"]

SMALL = {"refresh": 4, "expand": 2}


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, expand: int, **settings: Any
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights."""
    return mix_with(x, weights, place, gates=("alpha", "theta"), retention="kl", **settings)
