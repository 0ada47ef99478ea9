r"""The architecture of a memory whose content is its weights: a perceptron, its run and its slopes.

.. math:: h = W_n\, g(\dots g(W_1 x)), \qquad M(x) = h \quad\text{or}\quad x + \gamma \operatorname{LN}(h) ,

with :math:`g` the GELU. The slope of any loss in a weight is a sum over tokens of an outer product, the layer's input
by the slope in its output; so tokens need not be differentiated one by one, and their updates need no storage each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Perceptron", "Tape"]


@dataclass(frozen=True)
class Tape:
    """What a run leaves for its slopes: the input of each layer, and its output before the nonlinearity."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Perceptron:
    """The architecture.

    Attributes:
        depth: layers; one is a matrix.
        expand: width between layers over the width of what comes out.
        residual: whether what comes out is the input plus the layers' output, normalised: a bounded answer.
        eps: added to the variance.
    """

    depth: int = 2
    expand: int = 4
    residual: bool = True
    eps: float = 1e-5

    def shapes(self, inputs: int, dim: int) -> list[tuple[int, int]]:
        """Width of input and of output of each layer."""
        inner = [self.expand * dim] * (self.depth - 1)
        return list(zip([inputs, *inner], [*inner, dim], strict=True))

    def run(
        self,
        x: Float[Tensor, "... tokens inputs"],
        skip: Float[Tensor, "... tokens dim"],
        gain: Float[Tensor, "heads 1 dim"],
        layer: Callable[[int, Tensor], Tensor],
    ) -> tuple[Float[Tensor, "... tokens dim"], Tape]:
        """What the memory answers.

        Args:
            x: what goes into the first layer.
            skip: what the answer is added to, if it is.
            gain: of the norm.
            layer: the linear maps, by their number: here the weights come in, as matrices or otherwise.
        """
        tape = Tape([], [])
        for index in range(self.depth):
            tape.inputs.append(x)
            tape.outputs.append(layer(index, x))
            x = F.gelu(tape.outputs[-1]) if index < self.depth - 1 else tape.outputs[-1]
        return (skip + gain * self._normed(x)[0] if self.residual else x), tape

    def slopes(
        self,
        slope: Float[Tensor, "... tokens dim"],
        tape: Tape,
        gain: Float[Tensor, "heads 1 dim"],
        weights: Sequence[Float[Tensor, "... inputs outputs"]],
    ) -> list[Float[Tensor, "... tokens outputs"]]:
        """Each layer's slope of the loss in its output, from the slope in the answer."""
        if self.residual:
            slope = self._through_norm(slope * gain, tape.outputs[-1])
        found = [slope]
        for index in range(self.depth - 1, 0, -1):
            slope = (slope @ weights[index].mT) * _gelu_slope(tape.outputs[index - 1])
            found.append(slope)
        return found[::-1]

    def _normed(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``h`` with mean 0 and variance 1 over its channels, and the inverse of its deviation."""
        centred = h - h.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return centred * inverse, inverse

    def _through_norm(self, slope: Tensor, h: Tensor) -> Tensor:
        normed, inverse = self._normed(h)
        along = (slope * normed).mean(-1, keepdim=True)
        return inverse * (slope - slope.mean(-1, keepdim=True) - normed * along)


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
