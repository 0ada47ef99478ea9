r"""Atlas: the Omega rule with momentum and Muon,

.. math:: S_t = \theta_t S_{t-1} - \sum_{t-c < i \le t} \gamma_i \nabla \|M(\phi(k_i)) - v_i\|^2, \qquad
    M_t = \alpha_t M_{t-1} + \eta_t \operatorname{NS}_5(S_t) ,

or, by block, one step :math:`\operatorname{NS}_5(S)` at the end of each, as large as those of all its tokens together.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import mix_with
from vestige.evidence.references.mixing import Weights

__all__ = ["SMALL", "mix"]

SMALL = {"refresh": 4, "window": 3, "muon": 2}


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    expand: int,
    muon: int,
    step: float,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights. The paper's theta is the eta here, its eta the lambda."""
    return mix_with(
        x, weights, place, gates=("alpha", "theta", "eta", "lam"), newton_schulz=muon, step=step, **settings
    )
