r"""Yaad: :math:`W_t = \alpha_t W_{t-1} - \theta_t \nabla H_{\delta_t}(\|M(k_t) - v_t\|)` with Huber's
:math:`H_\delta(z) = z^2/2` up to :math:`\delta`, then :math:`\delta z - \delta^2/2`.
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
    return mix_with(x, weights, place, gates=("alpha", "theta", "delta"), bias="huber", **settings)
