"""SGLU: ``W_down (W_gate x * W_up x)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vestige.evidence.references.mixing import Weights, linear

__all__ = ["mix"]


def mix(x: Tensor, weights: Weights, place: Any, **unused: Any) -> Tensor:
    """Each token on its own."""
    return linear(linear(x, weights, "gate_proj") * linear(x, weights, "up_proj"), weights, "down_proj")
