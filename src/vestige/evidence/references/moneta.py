r"""Moneta:

.. math:: A_t = \alpha_t A_{t-1} - \theta_t \nabla \|M(k_t) - v_t\|_p^p, \qquad W_t = A_t / \|A_t\|_q^{q-2} .
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
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, p: float, q: float, expand: int, **settings: Any
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights."""
    choices: dict[str, Any] = {"bias": "lp", "power": p, "retention": "q-norm", "q_norm": q}
    return mix_with(x, weights, place, gates=("alpha", "theta"), **choices, **settings)
