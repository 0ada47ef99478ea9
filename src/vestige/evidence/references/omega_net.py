r"""OmegaNet: at each token a step on all of the last :math:`c`,

.. math:: M_t = \alpha_t M_{t-1} - \sum_{t-c < i \le t} \gamma_i \nabla \|M(\phi(k_i)) - v_i\|^2 ,

with :math:`\phi` every product of up to ``degree`` channels, times a learned factor for their number.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import mix_with
from vestige.evidence.references.mixing import Weights

__all__ = ["SMALL", "mix"]

SMALL = {"refresh": 4, "window": 3}


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, expand: int, **settings: Any
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights."""
    return mix_with(x, weights, place, gates=("alpha", "theta"), **settings)
