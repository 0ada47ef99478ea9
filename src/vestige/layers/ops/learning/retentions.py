r"""Retention gates: how the weights of a memory follow from what the rule adds up.

The rule moves a matrix :math:`A` that fades and is added to; the memory answers with weights that are a function of it:

- ``decay``: :math:`W = A` (an L2 penalty on the weights and on their change);
- ``q-norm``: :math:`W = A / \|A\|_q^{q-2}` (the mirror map of :math:`\tfrac12 \|W\|_{q'}^2`);
- ``kl``: :math:`W = c\,\operatorname{softmax}(A)` for each output's weights (the divergence from the weights before,
  on a simplex of size c): :math:`A = \log W` up to a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Retention", "RetentionName"]

RetentionName = Literal["decay", "q-norm", "kl"]
SMALLEST = 1e-6


@dataclass(frozen=True)
class Retention:
    """One of them, by name; ``power`` is the q of ``q-norm``, ``mass`` the c of ``kl``."""

    name: RetentionName = "decay"
    power: float = 4.0
    mass: float = 1.0

    @property
    def linear(self) -> bool:
        """Whether the weights are what the rule adds up."""
        return self.name == "decay"

    def weights(self, total: Float[Tensor, "... inputs outputs"]) -> Float[Tensor, "... inputs outputs"]:
        """The weights that the memory answers with."""
        if self.name == "kl":
            return self.mass * torch.softmax(total, dim=-2)
        if self.name == "q-norm":
            return total * self.scale(total)
        return total

    def scale(self, total: Float[Tensor, "... inputs outputs"]) -> Float[Tensor, "... 1 1"]:
        """What ``q-norm`` multiplies by."""
        largest = self._largest(total)  # powers could overflow
        return self.divided(
            largest * _powered(total / largest, self.power).sum((-2, -1), keepdim=True).pow(1 / self.power)
        )

    def divided(self, norm: Tensor) -> Tensor:
        """The same, from the norm."""
        return norm.clamp_min(SMALLEST).pow(2 - self.power)

    def divided_back(self, u: Tensor, norm: Tensor) -> Tensor:
        """The slope in the norm of :meth:`divided`, from the slope ``u`` in that."""
        return torch.where(norm > SMALLEST, (2 - self.power) * u * norm.clamp_min(SMALLEST).pow(1 - self.power), 0)

    def back(
        self, u: Float[Tensor, "... inputs outputs"], total: Float[Tensor, "... inputs outputs"]
    ) -> Float[Tensor, "... inputs outputs"]:
        """The slope in what is added up of :meth:`weights`, from the slope ``u`` in these."""
        if self.name == "kl":
            shares = torch.softmax(total, dim=-2)
            return self.mass * shares * (u - (shares * u).sum(-2, keepdim=True))
        if self.name == "q-norm":
            largest = self._largest(total)
            small = total / largest
            power = _powered(small, self.power).sum((-2, -1), keepdim=True)
            norm = largest * power.pow(1 / self.power)
            along = self.divided_back((u * total).sum((-2, -1), keepdim=True), norm) * norm / (power * largest)
            steep = small * small.abs().clamp_min(SMALLEST).pow(self.power - 2)
            return torch.addcmul(along * steep, u, self.divided(norm))
        return u

    @staticmethod
    def _largest(total: Tensor) -> Tensor:
        return total.detach().abs().amax((-2, -1), keepdim=True).clamp_min(SMALLEST)


def _powered(x: Tensor, power: float) -> Tensor:
    """A power of the size: products where it is four, for a general one takes ten times as long."""
    return x.square().square() if power == 4.0 else x.abs().pow(power)
