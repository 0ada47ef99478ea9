r"""Triton form of what a layer of a memory holds after a block of tokens, with momentum, for CUDA.

.. math:: A' = a A + c S - X^\top \operatorname{diag}(r) D, \qquad S' = e S - X^\top \operatorname{diag}(h) D .

The weights are the large part of it, and each is read and written once, forward and backward. Products keep the digits
of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vestige.layers.ops.tiles_triton import _matrix, _put_matrix

__all__ = ["update_back_cuda", "update_cuda"]

SIDE = 64
TOKENS = 32


@triton.jit
def _forward(
    total, surprise, inputs, slope, gates, share, heap, new_total, new_surprise, memories, tokens, height, width,
    TOKENS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    a, s = _matrix(total, at, rows, columns, height, width), _matrix(surprise, at, rows, columns, height, width)
    here = gates + at
    a = tl.load(here) * a + tl.load(here + memories) * s
    s = tl.load(here + 2 * memories) * s
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        x = tl.trans(_matrix(inputs, at, token, rows, tokens, height))
        d = _matrix(slope, at, token, columns, tokens, width)
        r = tl.load(share + at * tokens + token, mask=token < tokens, other=0.0)
        h = tl.load(heap + at * tokens + token, mask=token < tokens, other=0.0)
        a -= tl.dot(x, r[:, None] * d, input_precision="tf32x3")
        s -= tl.dot(x, h[:, None] * d, input_precision="tf32x3")
    _put_matrix(new_total, at, rows, columns, height, width, a)
    _put_matrix(new_surprise, at, rows, columns, height, width, s)


@triton.jit
def _backward(
    total, surprise, gates, d_new_total, d_new_surprise, more_total, more_surprise, d_total, d_surprise, d_gates,
    memories, height, width, SIDE: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Of the weights, beside slopes that come from elsewhere; each program leaves its part of the gates' slopes."""
    at = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    a, s = _matrix(total, at, rows, columns, height, width), _matrix(surprise, at, rows, columns, height, width)
    da = _matrix(d_new_total, at, rows, columns, height, width)
    ds = _matrix(d_new_surprise, at, rows, columns, height, width)
    here = gates + at
    here_total = tl.load(here) * da
    here_surprise = tl.load(here + memories) * da + tl.load(here + 2 * memories) * ds
    if MORE:
        here_total += _matrix(more_total, at, rows, columns, height, width)
        here_surprise += _matrix(more_surprise, at, rows, columns, height, width)
    _put_matrix(d_total, at, rows, columns, height, width, here_total)
    _put_matrix(d_surprise, at, rows, columns, height, width, here_surprise)
    part = d_gates + (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * 3 * memories + at
    tl.store(part, tl.sum(da * a))
    tl.store(part + memories, tl.sum(da * s))
    tl.store(part + 2 * memories, tl.sum(ds * s))


def update_cuda(
    before: list[Tensor],
    inputs: Tensor,
    slope: Tensor,
    left: Tensor,
    share: Tensor,
    heap: Tensor,
    after: list[Tensor],
) -> None:
    """What a layer holds after a block: the sum, and the surprise.

    Args:
        before: ``(memories, inputs, outputs)`` A and S.
        inputs, slope: ``(memories, rows, ...)`` X, of the layer, and D, in its output.
        left: ``(3, memories)`` how much is left of A in A, of S in A, and of S in S.
        share, heap: ``(memories, rows)`` r and h, how much of each row's slope is in A, and in S.
        after: where it is written to.
    """
    parts = [t.contiguous() for t in (*before, inputs, slope, left, share, heap)]
    memories, tokens, _ = inputs.shape
    with torch.cuda.device_of(slope):
        _forward[(memories, *_sides(after[0]))](
            *parts, *after, memories, tokens, *after[0].shape[1:], TOKENS=TOKENS, SIDE=SIDE, num_warps=4
        )


def update_back_cuda(
    before: list[Tensor], left: Tensor, d_after: list[Tensor], beside: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The slopes in A and S before, and in what is left of them, from those after; ``beside`` are slopes in A
    and S before that come from elsewhere, if there are any. Those in what is left are in parts, to be added up."""
    total, surprise, left, *d_after = (t.contiguous() for t in (*before, left, *d_after))
    more = [t.contiguous() for t in beside] or d_after
    d_total, d_surprise = torch.empty_like(total), torch.empty_like(surprise)
    sides = _sides(total)
    d_left = left.new_empty(sides[0] * sides[1], *left.shape)
    with torch.cuda.device_of(total):
        _backward[(len(total), *sides)](
            total, surprise, left, *d_after, *more, d_total, d_surprise, d_left,
            len(total), *total.shape[1:], SIDE=SIDE, MORE=bool(beside), num_warps=4,
        )  # fmt: skip
    return [d_total, d_surprise], d_left


def _sides(total: Tensor) -> tuple[int, int]:
    """Over how many programs a memory's weights are spread."""
    height, width = total.shape[1:]
    return triton.cdiv(height, SIDE), triton.cdiv(width, SIDE)
