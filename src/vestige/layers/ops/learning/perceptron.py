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

from vestige.layers.ops.recurrence import has_kernels

__all__ = ["Perceptron", "Tape", "has_own_kernels", "through_norm", "twice_gelu", "twice_norm"]

DENSITY = 1 / math.sqrt(2 * math.pi)


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
        weights: Sequence[Float[Tensor, "... inputs outputs"]],
    ) -> tuple[list[Float[Tensor, "... tokens outputs"]], list[Float[Tensor, "... tokens outputs"]]]:
        """Each layer's slope of the loss in its output, from the slope in the answer (times the gain, if there is a
        norm); and those of all but the last before they went through the nonlinearity."""
        if self.residual:
            slope = through_norm(slope, tape.outputs[-1], *tape.moments)
        found, before = [slope], []
        for index in range(self.depth - 1, 0, -1):
            before.append(slope @ weights[index].mT)
            slope = torch.ops.aten.gelu_backward(before[-1], tape.outputs[index - 1])
            found.append(slope)
        return found[::-1], before[::-1]


def through_norm(slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The slope in what is normalised over its last dimension, from that in what comes out."""
    which = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(slope, h, h.shape[-1:], mean, inverse, None, None, which)[0]


def twice_gelu(u: Tensor, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes in ``slope`` and ``x`` of what ``gelu_backward`` makes of them, from the slope ``u`` in that."""
    if has_own_kernels(u):
        from vestige.layers.ops.learning.slopes_triton import twice_gelu_cuda

        return twice_gelu_cuda(u, slope, x)
    second = torch.exp(-0.5 * x.square()).mul_(2 - x.square()).mul_(DENSITY)
    return torch.ops.aten.gelu_backward(u, x), second.mul_(u).mul_(slope)


def twice_norm(u: Tensor, slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    r"""The slopes in ``slope`` and ``h`` of what :func:`through_norm` makes of them, from the slope ``u`` in that.

    With :math:`n` the normalised channels, :math:`r` the inverse of their deviation, :math:`\langle\cdot\rangle` a mean
    over channels and :math:`P(u) = u - \langle u \rangle - n \langle u n \rangle`, it is :math:`d = r P(g)`, and

    .. math::
        dg = r P(u), \qquad dh = r P(w) - \tfrac{r^2}{D} \Big(\sum u\,P(g)\Big) n, \qquad
        w = -r \big(u \langle g n \rangle + g \langle u n \rangle\big) .
    """
    if has_own_kernels(u):
        from vestige.layers.ops.learning.slopes_triton import twice_norm_cuda

        return twice_norm_cuda(u, slope, h, mean, inverse)
    n = (h - mean) * inverse

    def across(t: Tensor) -> Tensor:
        return t - t.mean(-1, keepdim=True) - n * (t * n).mean(-1, keepdim=True)

    along, beside = ((t * n).mean(-1, keepdim=True) for t in (slope, u))
    w = torch.addcmul(u * along, slope, beside).mul_(-inverse)
    through = (u * across(slope)).mean(-1, keepdim=True)
    return inverse * across(u), inverse * across(w) - inverse.square() * through * n


def has_own_kernels(like: Tensor) -> bool:
    """Whether kernels of our own serve; a compiler makes its own of the lines that say the same."""
    return has_kernels(like) and not torch.compiler.is_compiling()
