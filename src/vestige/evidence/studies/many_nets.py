"""Many small networks trained at once, each on examples of its own, with or without a limit on each example's say.

Networks are stacked along the first axis, and gradients are written out, which also gives the norm of every example's
gradient for next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Limit", "Nets", "example_norms", "fit", "noise_for"]

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class Limit:
    """How much one example may change a network: differential privacy of ``epsilon`` with probability ``1 - delta``.

    Each example's gradient is clipped to the norm ``clip``, and noise is added to their sum.
    """

    epsilon: float
    delta: float
    clip: float


@dataclass(frozen=True)
class Nets:
    """Networks with one hidden layer."""

    into: Float[Tensor, "nets inputs hidden"]
    into_bias: Float[Tensor, "nets 1 hidden"]
    out: Float[Tensor, "nets hidden classes"]
    out_bias: Float[Tensor, "nets 1 classes"]

    def classes(self, x: Float[Tensor, "examples inputs"]) -> Int[Tensor, "nets examples"]:
        """What each network says."""
        hidden = (x @ self.into + self.into_bias).relu()
        return (hidden @ self.out + self.out_bias).argmax(dim=-1)


def noise_for(epsilon: float, delta: float, steps: int) -> float:
    """Noise, in clipping norms, that makes so many Gaussian steps on all examples (epsilon, delta)-private.

    Each step is 1 / (2 noise^2)-zero-concentrated differentially private, and that adds up; with rho the sum,
    epsilon = rho + 2 sqrt(rho log(1 / delta)) (Bun and Steinke 2016).
    """
    cost = math.log(1 / delta)
    rho = (math.sqrt(cost + epsilon) - math.sqrt(cost)) ** 2
    return math.sqrt(steps / (2 * rho))


def example_norms(
    x: Float[Tensor, "examples inputs"],
    hidden: Float[Tensor, "... examples hidden"],
    back_hidden: Float[Tensor, "... examples hidden"],
    back_out: Float[Tensor, "... examples classes"],
) -> Float[Tensor, "... examples"]:
    """Norm of each example's gradient, from what goes into each layer and what comes back to it, biases included."""
    first = (x.square().sum(dim=-1) + 1) * back_hidden.square().sum(dim=-1)
    second = (hidden.square().sum(dim=-1) + 1) * back_out.square().sum(dim=-1)
    return (first + second).sqrt()


def fit(
    x: Float[Tensor, "examples inputs"],
    y: Int[Tensor, " examples"],
    chosen: Bool[Tensor, "nets examples"],
    *,
    classes: int,
    hidden: int,
    steps: int,
    rate: float,
    seeds: Sequence[int],
    limit: Limit | None = None,
) -> Nets:
    """Train one network on each choice of the examples: Adam, all examples at each step.

    Args:
        chosen: which examples each network sees.
        seeds: of each network's weights and noise.
    """
    drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
    shapes = ((x.shape[1], hidden), (1, hidden), (hidden, classes), (1, classes))
    scales = ((2 / x.shape[1]) ** 0.5, 0.0, (1 / hidden) ** 0.5, 0.0)
    parts = [
        torch.stack([torch.randn(shape, generator=one) * scale for one in drawn]).to(x)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    noise = 0.0 if limit is None else limit.clip * noise_for(limit.epsilon, limit.delta, steps)
    due, weight = F.one_hot(y, classes).to(x), chosen.to(x)
    count = weight.sum(dim=1)[:, None, None]
    first, second = [torch.zeros_like(part) for part in parts], [torch.zeros_like(part) for part in parts]
    for step in range(1, steps + 1):
        before = x @ parts[0] + parts[1]
        inner = before.relu()
        back_out = (inner @ parts[2] + parts[3]).softmax(dim=-1) - due
        back_hidden = (back_out @ parts[2].mT) * (before > 0)
        heard = weight
        if limit is not None:
            norms = example_norms(x, inner, back_hidden, back_out)
            heard = weight * (limit.clip / norms.clamp_min(1e-12)).clamp_max(1)
        back_out, back_hidden = back_out * heard[..., None], back_hidden * heard[..., None]
        sums = [x.mT @ back_hidden, back_hidden.sum(1, True), inner.mT @ back_out, back_out.sum(1, True)]
        for place, (part, total) in enumerate(zip(parts, sums, strict=True)):
            if noise:
                total = total + noise * torch.stack([torch.randn(shapes[place], generator=g) for g in drawn]).to(x)
            slope = total / count
            first[place].lerp_(slope, 1 - BETAS[0])
            second[place].lerp_(slope.square(), 1 - BETAS[1])
            mean, spread = first[place] / (1 - BETAS[0] ** step), second[place] / (1 - BETAS[1] ** step)
            part -= rate * mean / (spread.sqrt() + EPSILON)
    return Nets(*parts)
