r"""Titans, memory as a layer: :math:`y = M(x)`, then attention to a window of :math:`y` and to persistent tokens."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import mix_with
from vestige.evidence.references.mixing import Weights, linear
from vestige.evidence.references.titans_mag import seen_by

__all__ = ["SMALL", "mix"]

SMALL = {"refresh": 4, "expand": 2, "window": 5, "persistent": 2}


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    expand: int,
    momentum: bool,
    window: int,
    persistent: int,
    theta: float,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Widths and the number of persistent tokens show in the weights."""
    gates = ("alpha", "theta", "eta") if momentum else ("alpha", "theta")
    y = mix_with(x, weights, place, heads=heads, gates=gates, **settings)
    return linear(seen_by(y, weights, heads or place.heads, theta, window), weights, "out_proj")
