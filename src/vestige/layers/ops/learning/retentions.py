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
            largest = total.detach().abs().amax((-2, -1), keepdim=True).clamp_min(SMALLEST)  # powers could overflow
            norm = largest * (total / largest).abs().pow(self.power).sum((-2, -1), keepdim=True).pow(1 / self.power)
            return total / norm.clamp_min(SMALLEST).pow(self.power - 2)
        return total
