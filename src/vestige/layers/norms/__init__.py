"""Norms, by name."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from vestige.core.method import did_you_mean
from vestige.errors import SpecError
from vestige.layers.ops.recurrence import exact

__all__ = ["NORMS", "SimpleRMSNorm", "build_norm", "check_norm"]


class SimpleRMSNorm(nn.Module):
    """``x / (|x| / sqrt(dim) + eps)``, without weights (TransNormerLLM)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        wide = x.to(exact(x))
        size = wide.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / (size + self.eps)).to(x.dtype)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rmsnorm": lambda size, eps: nn.RMSNorm(size, eps=eps),
    "layernorm": lambda size, eps: nn.LayerNorm(size, eps=eps),
    "simple-rmsnorm": lambda size, eps: SimpleRMSNorm(eps),
}
"""Name to a function of width and eps."""


def check_norm(name: str) -> str:
    """The name, if a norm has it.

    Raises:
        SpecError: no such norm, with the nearest names.
    """
    if name not in NORMS:
        raise SpecError(f"unknown norm {name!r}; {did_you_mean(str(name), NORMS)}")
    return name


def build_norm(name: str, size: int, eps: float) -> nn.Module:
    """The norm of a name.

    Raises:
        SpecError: no such norm.
    """
    return NORMS[check_norm(name)](size, eps)
