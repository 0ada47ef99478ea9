r"""Attentional biases: what a memory that learns is asked to make small, as the slope in its answer.

With :math:`e = M(k) - v`, per token: ``l2``: :math:`|e|^2`; ``lp``: :math:`\sum_j |e_j|^p`, with
:math:`|x| \approx \sqrt{x^2 + 10^{-6}}`, so that it is smooth; ``huber``: :math:`\tfrac12 |e|^2` up to
:math:`|e| = \delta`, then :math:`\delta |e|` less a constant; ``dot``: :math:`-M(k) \cdot v`, Hebb's rule, which no
answer ever satisfies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Bias", "BiasName"]

BiasName = Literal["l2", "lp", "huber", "dot"]
SMOOTH = 1e-6


@dataclass(frozen=True)
class Bias:
    """One of them, by name; ``power`` is the p of ``lp``."""

    name: BiasName = "l2"
    power: float = 3.0

    def slope(
        self,
        error: Float[Tensor, "... tokens dim"],
        value: Float[Tensor, "... tokens dim"],
        bound: Float[Tensor, "... tokens"] | None = None,
    ) -> Float[Tensor, "... tokens dim"]:
        """The slope of the loss in the answer; ``bound`` is the delta of ``huber``."""
        if self.name == "dot":
            return -value
        if self.name == "l2":
            return 2 * error
        if self.name == "lp":
            return self.power * error * (error.square() + SMOOTH).pow(self.power / 2 - 1)
        assert bound is not None
        size = (error.square().sum(-1, keepdim=True) + SMOOTH**2).sqrt()
        return error * torch.clamp(bound[..., None] / size, max=1.0)

    def back(
        self,
        u: Float[Tensor, "... tokens dim"],
        error: Float[Tensor, "... tokens dim"],
        bound: Float[Tensor, "... tokens"] | None = None,
    ) -> tuple[Float[Tensor, "... tokens dim"], Float[Tensor, "... tokens dim"], Float[Tensor, "... tokens"] | None]:
        """The slopes in answer, value and bound of what :meth:`slope` makes of them, from the slope ``u`` in that."""
        if self.name == "dot":
            return torch.zeros_like(u), -u, None
        if self.name == "l2":
            return 2 * u, -2 * u, None
        if self.name == "lp":
            square = error.square() + SMOOTH
            bent = square.pow(self.power / 2 - 2) * (square + (self.power - 2) * error.square())
            found = self.power * bent * u
            return found, -found, None
        assert bound is not None
        square = error.square().sum(-1, keepdim=True) + SMOOTH**2
        along = (error * u).sum(-1, keepdim=True)
        share, beyond = bound[..., None] * square.rsqrt(), bound[..., None] < square.sqrt()
        found = torch.where(beyond, share * (u - along / square * error), u)
        return found, -found, torch.where(beyond, along * square.rsqrt(), 0)[..., 0]
