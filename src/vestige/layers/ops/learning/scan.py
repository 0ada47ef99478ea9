r"""Blocks of tokens, one after the other, through a memory whose steps are linear in the slopes.

What is found is what each block teaches and what is held before it: answers to queries need no more, and can be worked
out for all blocks at once.

After a block of tokens with inputs :math:`X` and slopes :math:`D` of a layer there is

.. math:: A' = a A + c S - X^\top \operatorname{diag}(r) D, \qquad S' = e S - X^\top \operatorname{diag}(h) D ,

and the next block's slopes are taken at the weights that a retention makes of :math:`A'`. The loop over blocks is
what a text has to wait for, so it has few steps, and its derivative, written out here, hardly more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.lessons import Taught, gain_slope, teach, teach_back
from vestige.layers.ops.learning.perceptron import Perceptron, has_own_kernels
from vestige.layers.ops.learning.retentions import Retention

__all__ = ["Scanned", "scan"]


@dataclass(frozen=True)
class Scanned:
    """What blocks leave, for each layer of the memory.

    Attributes:
        total, surprise: ``(blocks, memories, inputs, outputs)`` A and S at the beginning of each block.
        last_total, last_surprise: after the last one.
        pairs: ``(blocks, memories, rows, ...)`` the layer's input and the slope in its output.
    """

    total: list[Tensor]
    surprise: list[Tensor]
    last_total: list[Tensor]
    last_surprise: list[Tensor]
    pairs: list[tuple[Tensor, Tensor]]


def scan(
    memory: Perceptron,
    bias: Bias,
    retention: Retention,
    x: Float[Tensor, "blocks memories rows inputs"],
    k: Float[Tensor, "blocks memories rows dim"],
    v: Float[Tensor, "blocks memories rows dim"],
    bound: Float[Tensor, "blocks memories rows"] | None,
    gain: Float[Tensor, "memories 1 dim"],
    left: Float[Tensor, "blocks gates memories"],
    share: Float[Tensor, "blocks memories rows"],
    pile: Float[Tensor, "blocks memories rows"],
    total: Sequence[Tensor],
    surprise: Sequence[Tensor],
    point: Sequence[Tensor],
    start: Sequence[Tensor],
    fresh: Bool[Tensor, "blocks memories"] | None,
) -> Scanned:
    """Let blocks teach a memory.

    Args:
        x, k: what the first layer sees of keys, and keys; v: values; bound: of the loss.
        gain: of the network's norm.
        left: a, and where there is momentum c and e: how much is left of A in A, of S in A, and of S in S.
        share, pile: r and h, how much of each row's slope is in A, and in S.
        total, surprise: for each layer ``(memories, inputs, outputs)`` what there is before; no surprise: no momentum.
        point: where the slopes of the first block are taken.
        start, fresh: what a memory begins with, and where, before which block but the first, it begins anew.
    """
    blocks, depth = len(x), memory.depth
    k, point, start = k.view_as(k), [t.view_as(t) for t in point], [t.view_as(t) for t in start]  # a compiler wants
    parts = (*total, *surprise, *point, *start)  # that no two of what is given are one tensor
    how = memory, bias, retention, bool(surprise)
    found = list(_Scan.apply(*how, fresh, x, k, v, bound, gain, left, share, pile, *parts))

    def take(count: int) -> list[Tensor]:
        return [found.pop(0) for _ in range(count)]

    inputs, slopes, last_total, last_surprise = take(depth - 1), take(depth), take(depth), take(len(surprise))
    if blocks == 1:
        befores = [t[None] for t in total], [t[None] for t in surprise]
    else:
        befores = take(depth), take(len(surprise))
    return Scanned(*befores, last_total, last_surprise, list(zip([x, *inputs], slopes, strict=True)))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        memory: Perceptron,
        bias: Bias,
        retention: Retention,
        momentum: bool,
        fresh: Tensor | None,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        bound: Tensor | None,
        gain: Tensor,
        left: Tensor,
        share: Tensor,
        pile: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        blocks, layers = len(x), range(memory.depth)
        total, surprise, point, start = _split(parts, memory.depth, momentum)
        befores = [[t.new_empty(blocks, *t.shape) for t in kind] for kind in (total, surprise)] if blocks > 1 else []
        lasts = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in kind] for kind in (total, surprise)
        ]
        for kind, given in zip(befores, (total, surprise), strict=False):
            for room, part in zip(kind, given, strict=True):
                room[0] = part
        lessons = []
        told = zip(*(_unbound(t, blocks) for t in (x, k, v, bound, left, share, pile)), strict=True)
        held = [[t.unbind(0) for t in kind] for kind in befores]
        for n, (x_, k_, v_, bound_, left_, share_, pile_) in enumerate(told):
            if held:
                total, surprise = ([t[n] for t in kind] for kind in held)
            if n and fresh is not None:
                anew = fresh[n, :, None, None]
                for part, first in zip(total, start, strict=True):
                    part.copy_(torch.where(anew, first, part))
                for part in surprise:
                    part.masked_fill_(anew, 0)
            weights = [retention.weights(t) for t in total] if n else point
            found = teach(memory, bias, x_, k_, v_, bound_, gain, weights)
            lessons.append(found.flat())
            after = [[t[n + 1] for t in kind] for kind in held] if n + 1 < blocks else lasts
            for i in layers:
                before, to = ([kind[i] for kind in kinds if kind] for kinds in ((total, surprise), after))
                _update(before, found.inputs[i], found.slopes[i], left_, share_, pile_, to)
        flat = [torch.stack(column) if blocks > 1 else column[0][None] for column in zip(*lessons, strict=True)]
        found = Taught.of(memory, flat)
        begun = [t for kind in befores for t in kind]
        ctx.save_for_backward(fresh, bound, gain, left, share, pile, *parts, *found.flat(), *begun)
        ctx.memory, ctx.bias, ctx.retention, ctx.momentum, ctx.parts = memory, bias, retention, momentum, len(parts)
        return (*found.inputs[1:], *found.slopes, *lasts[0], *lasts[1], *begun)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:  # type: ignore[override]
        memory, bias, retention, depth = ctx.memory, ctx.bias, ctx.retention, ctx.memory.depth
        fresh, bound, gain, left, share, pile, *rest = ctx.saved_tensors
        parts, rest = rest[: ctx.parts], rest[ctx.parts :]
        lessons = Taught.of(memory, rest)
        befores = rest[len(lessons.flat()) :]
        total, surprise, point, start = _split(parts, depth, ctx.momentum)
        blocks, kinds = len(share), 1 + ctx.momentum
        held = list(slopes[2 * depth - 1 :][: kinds * depth])
        d_befores = [t.unbind(0) for t in slopes[2 * depth - 1 + len(held) :]]
        d_inputs = [torch.zeros_like(lessons.inputs[0][:1]).expand_as(lessons.inputs[0]), *slopes[: depth - 1]]
        d_inputs, d_slopes = ([t.unbind(0) for t in some] for some in (d_inputs, slopes[depth - 1 : 2 * depth - 1]))
        shares = [t[..., None] for t in (share, pile)[:kinds]]
        told = [[(t * slope).unbind(0) for t in shares] for slope in lessons.slopes]
        each = zip(*(_unbound(t, blocks) for t in (bound, left, *shares, *lessons.flat())), strict=True)
        befores = [t.unbind(0) for t in befores]
        d_start = [torch.zeros_like(first) for first in start]
        d_weights: list[Tensor] = []
        kept: list[list[Tensor | None]] = []
        for n, (bound_, left_, *rest) in reversed(list(enumerate(each))):
            if befores:
                total, surprise = _halves([t[n] for t in befores], depth)
            weigh, lesson = rest[:kinds], Taught.of(memory, rest[kinds:])
            d_here, d_said = [t[n] for t in d_inputs], [t[n] for t in d_slopes]
            by = []
            for i in range(depth):
                pair = [kind[i] for kind in (total, surprise) if kind]
                after = held[i::depth]
                met = [torch.bmm(lesson.inputs[i], t) for t in after]
                for weight, seen, row, slope in zip(weigh, met, told[i], after, strict=True):
                    d_said[i] = torch.addcmul(d_said[i], weight, seen, value=-1)
                    d_here[i] = torch.baddbmm(d_here[i], row[n], slope.mT, alpha=-1)
                held[i::depth], d_left = _update_back(pair, left_, after, [t[n] for t in d_befores[i::depth]])
                by += [*met, d_left]
            weights = [retention.weights(t) for t in total] if n else point
            d_weights = held[:depth] if n and retention.linear else [torch.zeros_like(t) for t in point]
            back = teach_back(memory, bias, lesson, bound_, gain, weights, d_here, d_said, d_weights)
            if n and not retention.linear:
                for mine, slope, at in zip(held, d_weights, total, strict=False):
                    mine += retention.back(slope, at)
            if n and fresh is not None:
                anew = fresh[n, :, None, None]
                for first, mine in zip(d_start, held, strict=False):
                    first += mine.masked_fill(~anew, 0)
                for mine in held:
                    mine.masked_fill_(anew, 0)
            kept.append([back.inputs[0], back.skip, back.value, back.bound, back.over, back.answer, *by])
        columns = [None if t[0] is None else torch.stack(t[::-1]) for t in zip(*kept, strict=True)]
        d_x, d_skip, d_value, d_bound, over, answer, *by = columns
        d_gain = None if over is None else gain_slope(lessons, over, answer).sum(0)
        d_left, d_share, d_pile = _gates_back(lessons, by, share)
        return (
            *[None] * 5, d_x, d_skip, d_value, d_bound, d_gain, d_left, d_share, d_pile, *held, *d_weights, *d_start
        )  # fmt: skip


def _gates_back(lessons: Taught, by: list[Any], share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes in what is left, and in the shares of rows: sums over layers."""
    depth = len(lessons.slopes)
    width = len(by) // depth
    d_left = sum(part.sum(1) for part in by[width - 1 :: width])
    found = []
    for kind in range(2):
        met = by[kind::width] if kind < width - 1 else []
        parts = [(each * slope).sum(-1) for each, slope in zip(met, lessons.slopes, strict=False)]
        found.append(-sum(parts, torch.zeros_like(share)))
    return d_left, *found


def _split(parts: Sequence[Tensor], depth: int, momentum: bool) -> list[list[Tensor]]:
    """Totals, surprises, points and starts, by layer; there may be no surprises and no starts."""
    ends = [depth, depth + depth * momentum, 2 * depth + depth * momentum]
    return [list(parts[a:b]) for a, b in zip([0, *ends], [*ends, len(parts)], strict=True)]


def _unbound(tensor: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """What there is for each block: views that are made all at once."""
    return [None] * count if tensor is None else tensor.unbind(0)


def _halves(parts: list[Tensor], depth: int) -> tuple[list[Tensor], list[Tensor]]:
    return parts[:depth], parts[depth:]


def _update(
    before: list[Tensor],
    inputs: Tensor,
    slope: Tensor,
    left: Tensor,
    share: Tensor,
    pile: Tensor,
    after: list[Tensor],
) -> None:
    """What a layer holds after a block, A and perhaps S, written to ``after``."""
    if len(before) == 2 and has_own_kernels(slope):
        from vestige.layers.ops.learning.update_triton import update_cuda

        update_cuda(before, inputs, slope, left, share, pile, after)
        return
    gates = left[:, :, None, None]
    torch.mul(before[0], gates[0], out=after[0])
    if len(before) == 2:
        after[0].addcmul_(gates[1], before[1])
        torch.mul(before[1], gates[2], out=after[1])
    for held, weight in zip(after, (share, pile), strict=False):
        held.baddbmm_(inputs.mT, weight[..., None] * slope, alpha=-1)


def _update_back(
    before: list[Tensor], left: Tensor, d_after: list[Tensor], beside: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The slopes in what a layer held, and in what was left of it: ``(parts, gates, memories)``, to be added up;
    ``beside`` are slopes in what it held that come from elsewhere, if there are any."""
    if len(before) == 2 and has_own_kernels(left):
        from vestige.layers.ops.learning.update_triton import update_back_cuda

        return update_back_cuda(before, left, d_after, beside)
    gates = left[:, :, None, None]
    pairs = [(0, 0), (0, 1), (1, 1)][: len(left)]
    d_left = torch.stack([(d_after[i] * before[j]).sum((-2, -1)) for i, j in pairs])
    d_before = [gates[0] * d_after[0]]
    if len(before) == 2:
        d_before.append(torch.addcmul(gates[1] * d_after[0], gates[2], d_after[1]))
    for held, more in zip(d_before, beside, strict=False):
        held += more
    return d_before, d_left[None]
