r"""What a block of tokens teaches a memory whose weights stand: the input of each layer and the slope in its output.

Both are worked out from keys, values and weights; how they depend on them is written out too, so that a backward pass
is matrix products and a few small steps, without a graph of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.perceptron import Perceptron, through_norm, twice_gelu, twice_norm

__all__ = ["Slopes", "Taught", "taught", "teach", "teach_back"]


@dataclass(frozen=True)
class Taught:
    """What is found, and what its derivative needs. For each layer ``(memories, rows, ...)``.

    Attributes:
        inputs, slopes: what a layer saw, and the slope of the loss in what it said.
        outputs: what it said, before the nonlinearity.
        before: the slopes of all layers but the last one before they went through the nonlinearity.
        error: of the answer; slope: of the loss in the answer.
        moments: mean and inverse deviation of the last layer's channels, if they are normalised.
    """

    inputs: list[Tensor]
    slopes: list[Tensor]
    outputs: list[Tensor]
    before: list[Tensor]
    error: list[Tensor]
    slope: list[Tensor]
    moments: list[Tensor]

    def flat(self) -> list[Tensor]:
        """All of it, in order."""
        return [
            *self.inputs, *self.slopes, *self.outputs, *self.before, *self.error, *self.slope, *self.moments
        ]  # fmt: skip

    @classmethod
    def of(cls, memory: Perceptron, tensors: Sequence[Tensor]) -> Taught:
        """The same again."""
        rest, depth = iter(tensors), memory.depth
        counts = (depth, depth, depth, depth - 1, 1, 1, 2 * memory.residual)
        return cls(*([next(rest) for _ in range(count)] for count in counts))


@dataclass(frozen=True)
class Slopes:
    """Slopes in what :func:`teach` was given, in ``inputs`` of each layer, the first being ``x``.

    :func:`gain_slope` makes that in the gain of ``over``, in the slope that is normalised, and ``answer``.
    """

    inputs: list[Tensor]
    skip: Tensor | None
    value: Tensor
    bound: Tensor | None
    over: Tensor | None
    answer: Tensor


def teach(
    memory: Perceptron,
    bias: Bias,
    x: Float[Tensor, "memories rows inputs"],
    k: Float[Tensor, "memories rows dim"],
    v: Float[Tensor, "memories rows dim"],
    bound: Float[Tensor, "memories rows"] | None,
    gain: Float[Tensor, "memories 1 dim"],
    weights: Sequence[Float[Tensor, "memories inputs outputs"]],
) -> Taught:
    """What tokens teach a memory with these weights."""
    answer, tape = memory.run(x, k, gain, lambda index, t: torch.bmm(t, weights[index]))
    error = answer - v
    slope = bias.slope(error, v, bound)
    slopes, before = memory.slopes(slope * gain if memory.residual else slope, tape, weights)
    return Taught(tape.inputs, slopes, tape.outputs, before, [error], [slope], tape.moments)


def teach_back(
    memory: Perceptron,
    bias: Bias,
    found: Taught,
    bound: Tensor | None,
    gain: Tensor,
    weights: Sequence[Tensor],
    d_inputs: Sequence[Tensor],
    d_slopes: Sequence[Tensor],
    d_weights: Sequence[Tensor],
) -> Slopes:
    """Slopes in what was given, from those in what was found; those in the weights are added to ``d_weights``."""
    last = memory.depth - 1
    d_inputs, d_outputs, top = list(d_inputs), [], d_slopes[0]
    for index in range(1, memory.depth):
        back, through = twice_gelu(top, found.before[index - 1], found.outputs[index - 1])
        d_outputs.append(through)
        d_weights[index].baddbmm_(back.mT, found.slopes[index])
        top = torch.baddbmm(d_slopes[index], back, weights[index])
    over = d_output = None
    if memory.residual:
        over, d_output = twice_norm(top, found.slope[0] * gain, found.outputs[last], *found.moments)
        top = over * gain
    d_answer, d_value, d_bound = bias.back(top, found.error[0], bound)
    if d_output is None:
        d_outputs.append(d_answer)
    else:
        d_outputs.append(d_output.add_(through_norm(d_answer * gain, found.outputs[last], *found.moments)))
    for index in range(last, -1, -1):
        d_weights[index].baddbmm_(found.inputs[index].mT, d_outputs[index])
        d_inputs[index] = torch.baddbmm(d_inputs[index], d_outputs[index], weights[index].mT)
        if index:
            d_outputs[index - 1] += torch.ops.aten.gelu_backward(d_inputs[index], found.outputs[index - 1])
    return Slopes(d_inputs, d_answer if memory.residual else None, d_value, d_bound, over, d_answer)


def gain_slope(found: Taught, over: Tensor, answer: Tensor) -> Tensor:
    """The slope in the gain of what the answer was normalised by, and of what the slope went through."""
    mean, inverse = found.moments
    normed = (found.outputs[-1] - mean) * inverse
    return (answer * normed + over * found.slope[0]).sum(-2, keepdim=True)


class _Taught(torch.autograd.Function):
    """Of one block, with the weights behind the other inputs and a result of all inputs, then all slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        memory: Perceptron,
        bias: Bias,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        bound: Tensor | None,
        gain: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        found = teach(memory, bias, x, k, v, bound, gain, weights)
        ctx.save_for_backward(bound, gain, *weights, *found.flat())
        ctx.memory, ctx.bias = memory, bias
        return (*found.inputs[1:], *found.slopes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:  # type: ignore[override]
        memory, bias = ctx.memory, ctx.bias
        bound, gain, *rest = ctx.saved_tensors
        weights, found = rest[: memory.depth], Taught.of(memory, rest[memory.depth :])
        d_weights = [torch.zeros_like(weight) for weight in weights]
        d_inputs = [torch.zeros_like(found.inputs[0]), *slopes[: memory.depth - 1]]
        d_slopes = slopes[memory.depth - 1 :]
        back = teach_back(memory, bias, found, bound, gain, weights, d_inputs, d_slopes, d_weights)
        d_gain = None if back.over is None else gain_slope(found, back.over, back.answer)
        return None, None, back.inputs[0], back.skip, back.value, back.bound, d_gain, *d_weights


def taught(
    memory: Perceptron,
    bias: Bias,
    x: Float[Tensor, "memories rows inputs"],
    k: Float[Tensor, "memories rows dim"],
    v: Float[Tensor, "memories rows dim"],
    bound: Float[Tensor, "memories rows"] | None,
    gain: Float[Tensor, "memories 1 dim"],
    weights: Sequence[Float[Tensor, "memories inputs outputs"]],
) -> list[tuple[Tensor, Tensor]]:
    """For each layer its input and the slope in its output; what they depend on can be differentiated."""
    if not torch.is_grad_enabled():
        seen = teach(memory, bias, x, k, v, bound, gain, weights)
        return list(zip(seen.inputs, seen.slopes, strict=True))
    found = _Taught.apply(memory, bias, x, k.view_as(k), v, bound, gain, *weights)  # no tensor twice, for compilers
    inputs = [x, *found[: memory.depth - 1]]
    return list(zip(inputs, found[memory.depth - 1 :], strict=True))
