r"""Miras: a memory :math:`M`, a loss :math:`\ell`, a retention :math:`\varphi` and a rule, each chosen on its own,

.. math:: A_t = \alpha_t A_{t-1} - \theta_t \nabla \ell(M; k_t, v_t), \qquad W_t = \varphi(A_t) .
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
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    memory: str,
    loss: str,
    keep: str,
    learning: str,
    p: float,
    q: float,
    depth: int,
    residual: bool,
    expand: int,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Widths show in the weights."""
    gates = ["alpha", "theta"] + ["delta"] * (loss == "huber") + ["eta"] * (learning == "momentum")
    matrix = memory == "matrix"
    choices: dict[str, Any] = {"bias": loss, "power": p, "retention": keep, "q_norm": q}
    layers: dict[str, Any] = {"depth": 1 if matrix else depth, "residual": residual and not matrix}
    return mix_with(x, weights, place, gates=tuple(gates), **choices, **layers, **settings)
