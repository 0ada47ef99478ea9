r"""The architecture of a memory whose content is its weights: a perceptron, its run and its slopes.

.. math:: h = W_n\, g(\dots g(W_1 x)), \qquad M(x) = h \quad\text{or}\quad x + \gamma \operatorname{LN}(h) ,

with :math:`g` the GELU. The slope of any loss in a weight is a sum over tokens of an outer product, the layer's input
by the slope in its output; so tokens need not be differentiated one by one, and their updates need no storage each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.ops.recurrence import has_kernels

__all__ = ["Perceptron", "Tape"]


@dataclass(frozen=True)
class Tape:
    """What a run leaves for its slopes: the input of each layer, its output before the nonlinearity, and, if the last
    one is normalised, the mean and the inverse deviation of its channels."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    moments: list[Tensor]


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
        tape = Tape([], [], [])
        for index in range(self.depth):
            tape.inputs.append(x)
            tape.outputs.append(layer(index, x))
            x = F.gelu(tape.outputs[-1]) if index < self.depth - 1 else tape.outputs[-1]
        if self.residual:
            normed, *moments = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
            tape.moments.extend(moments)
            x = torch.addcmul(skip, gain, normed)
        return x, tape

    def slopes(
        self,
        slope: Float[Tensor, "... tokens dim"],
        tape: Tape,
        gain: Float[Tensor, "heads 1 dim"],
        weights: Sequence[Float[Tensor, "... inputs outputs"]],
    ) -> list[Float[Tensor, "... tokens outputs"]]:
        """Each layer's slope of the loss in its output, from the slope in the answer."""
        if has_kernels(slope) and not torch.compiler.is_compiling():
            from vestige.layers.ops.learning.slopes_triton import through_gelu, through_norm
        else:
            through_gelu, through_norm = torch.ops.aten.gelu_backward, _through_norm
        if self.residual:
            mean, inverse = (t.detach() for t in tape.moments)  # the slope's derivative knows what they are of
            slope = through_norm(slope * gain, tape.outputs[-1], mean, inverse)
        found = [slope]
        for index in range(self.depth - 1, 0, -1):
            slope = through_gelu(slope @ weights[index].mT, tape.outputs[index - 1])
            found.append(slope)
        return found[::-1]


def _through_norm(slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The slope in what is normalised. One kernel, which PyTorch differentiates once more, as it does GELU's."""
    which = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(slope, h, h.shape[-1:], mean, inverse, None, None, which)[0]
