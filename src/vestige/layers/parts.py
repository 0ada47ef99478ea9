"""Small parts that several mixers use: heads, short convolutions, rotary positions, norms of heads."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from vestige.layers.layout import Layout
from vestige.layers.ops.recurrence import exact

__all__ = [
    "GatedHeadNorm",
    "ShortConvolution",
    "draw_decay_rate",
    "draw_time_step",
    "join_heads",
    "rotate",
    "split_heads",
    "unit",
]


def split_heads(x: Float[Tensor, "batch length width"], heads: int) -> Float[Tensor, "batch length heads dim"]:
    """Cut the width into heads."""
    return x.unflatten(-1, (heads, -1))


def join_heads(x: Float[Tensor, "batch length heads dim"]) -> Float[Tensor, "batch length width"]:
    """Put the heads side by side."""
    return x.flatten(-2)


def unit(x: Float[Tensor, "... dim"], eps: float = 1e-6) -> Float[Tensor, "... dim"]:
    """Vectors of length one: ``x / sqrt(|x|^2 + eps)``, in float32 at least."""
    wide = x.to(exact(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Float[Tensor, "batch length heads dim"], layout: Layout, theta: float) -> Tensor:
    """Rotary positions: each pair ``(x_j, x_{j + dim/2})`` is turned by position times ``theta^(-2j/dim)``."""
    cos, sin = layout.angles(x.shape[-1], theta, exact(x))
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class ShortConvolution(nn.Module):
    """A causal convolution of a few tokens, each channel on its own, and SiLU after it.

    With what comes out it gives what the next pass is to be given: the last ``size - 1`` inputs. (It writes into no
    mapping: Accelerate, for one, calls modules with copies of these.) Nothing crosses the edge of a packed sequence.
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def draw(self) -> None:
        reach = 1 / math.sqrt(self.size)
        init.uniform_(self.weight, -reach, reach)
        if self.bias is not None:
            init.uniform_(self.bias, -reach, reach)

    def forward(
        self,
        x: Float[Tensor, "batch length channels"],
        layout: Layout,
        before: Float[Tensor, "batch reach channels"] | None = None,
    ) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch reach channels"]]:
        x = layout.blank(x)
        if before is None:
            before = x.new_zeros(x.shape[0], self.size - 1, x.shape[2])
        full = torch.cat([before.to(x.dtype), x], 1)
        if layout.starts is None:
            out = F.conv1d(full.mT, self.weight[:, None], self.bias, groups=x.shape[2]).mT
        else:
            out = self._packed(full, layout.starts)
        return F.silu(out), full[:, full.shape[1] - self.size + 1 :]

    def _packed(self, full: Tensor, starts: Bool[Tensor, "batch length"]) -> Tensor:
        """Tap by tap, each only while it stays within the token's own sequence."""
        length = starts.shape[1]
        age = self._age(starts)
        taps = [full[:, self.size - 1 - back : self.size - 1 - back + length] for back in range(self.size)]
        out = sum(
            tap * self.weight[:, self.size - 1 - back] * (age >= back)[..., None] for back, tap in enumerate(taps)
        )
        return out if self.bias is None else out + self.bias  # type: ignore[return-value]

    def _age(self, starts: Tensor) -> Tensor:
        """Tokens since the sequence of each began; what came before the row counts as its first sequence."""
        place = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        began = torch.where(starts, place, -self.size).cummax(1).values
        return place - began


class GatedHeadNorm(nn.Module):
    """RMS norm of each head, times SiLU of a gate: ``norm(x) * silu(gate)``."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=eps)

    def forward(
        self, x: Float[Tensor, "batch length heads dim"], gate: Float[Tensor, "batch length heads dim"]
    ) -> Float[Tensor, "batch length heads dim"]:
        return self.norm(x) * F.silu(gate)


def draw_time_step(bias: Tensor, low: float = 1e-3, high: float = 0.1, least: float = 1e-4) -> None:
    """Draw a bias such that its softplus, the time step, is log-uniform between two bounds (Mamba)."""
    drawn = torch.empty(bias.shape).uniform_(math.log(low), math.log(high)).exp().clamp_min(least)
    init.copy_(bias, (drawn + torch.log(-torch.expm1(-drawn))).to(bias))


def draw_decay_rate(log: Tensor, low: float = 0.01, high: float = 16.0) -> None:
    """Draw the logarithm of a rate of decay that is uniform between two bounds."""
    init.copy_(log, torch.empty(log.shape).uniform_(low, high).log().to(log))
