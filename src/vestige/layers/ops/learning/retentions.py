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
        norm = largest * _powered((total / largest).abs(), self.power).sum((-2, -1), keepdim=True).pow(1 / self.power)
        return norm.clamp_min(SMALLEST).pow(2 - self.power)

    def scale_back(
        self, u: Float[Tensor, "... 1 1"], total: Float[Tensor, "... inputs outputs"]
    ) -> Float[Tensor, "... inputs outputs"]:
        """The slope in what is added up of :meth:`scale`, from the slope ``u`` in that."""
        largest = self._largest(total)
        small = total / largest
        steep = self.power >= 2  # below it a power of nothing would be infinite
        bent = small * _powered(small.abs(), self.power - 2) if steep else small.sgn() * small.abs().pow(self.power - 1)
        power = (bent * small).sum((-2, -1), keepdim=True)
        norm = largest * power.pow(1 / self.power)
        factor = (2 - self.power) * norm.pow(2 - self.power) / (power * largest)
        return bent.mul_(torch.where(norm > SMALLEST, u * factor, 0))

    def back(
        self, u: Float[Tensor, "... inputs outputs"], total: Float[Tensor, "... inputs outputs"]
    ) -> Float[Tensor, "... inputs outputs"]:
        """The slope in what is added up of :meth:`weights`, from the slope ``u`` in these."""
        if self.name == "kl":
            shares = torch.softmax(total, dim=-2)
            return self.mass * shares * (u - (shares * u).sum(-2, keepdim=True))
        if self.name == "q-norm":
            along = (u * total).sum((-2, -1), keepdim=True)
            return torch.addcmul(self.scale_back(along, total), u, self.scale(total))
        return u

    @staticmethod
    def _largest(total: Tensor) -> Tensor:
        return total.detach().abs().amax((-2, -1), keepdim=True).clamp_min(SMALLEST)


def _powered(size: Tensor, power: float) -> Tensor:
    """A power of what is not negative: products where it is two or four, for others take ten times as long."""
    if power in (2.0, 4.0):
        square = size.square()
        return square if power == 2.0 else square.square()
    return size.pow(power)
