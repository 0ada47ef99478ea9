r"""The plain feed-forward layer: ``W_down act(W_up x)``. GELU is :math:`x \Phi(x)`, with the normal distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vestige.evidence.references.mixing import Weights, linear, silu

__all__ = ["mix"]

ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": silu,
}


def mix(x: Tensor, weights: Weights, place: Any, *, activation: str, **unused: Any) -> Tensor:
    """Each token on its own."""
    return linear(ACTIVATIONS[activation](linear(x, weights, "up_proj")), weights, "down_proj")
