r"""Titans' memory: a perceptron that learns each token with momentum and forgetting,

.. math:: S_t = \eta_t S_{t-1} - \theta_t \nabla \|M(k_t) - v_t\|^2, \qquad M_t = \alpha_t M_{t-1} + S_t ,

with gates :math:`\sigma` of a linear map of the token (the paper's :math:`1 - \alpha_t` is our :math:`\alpha_t`).
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
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, expand: int, momentum: bool, **settings: Any
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights."""
    gates = ("alpha", "theta", "eta") if momentum else ("alpha", "theta")
    return mix_with(x, weights, place, gates=gates, **settings)
