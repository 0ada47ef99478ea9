"""Tiles that kernels read and write, in Triton: tokens of a head, matrices, and what decays of a recurrence leave."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vestige.layers.ops.recurrence import FAINTEST

__all__ = ["BY_CHANNEL", "BY_HEAD", "CHUNK", "NO_DECAY", "processors", "summed"]

CHUNK = 64
"""Tokens that are worked out together."""

NO_DECAY, BY_HEAD, BY_CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

MILD = tl.constexpr(120.0)
"""How far the logarithm of what is left may fall over a chunk: both its halves, as factors, are far from overflow."""


@triton.jit
def _placed(count):
    """What a program works on, and which of so many beside each other it is: they share what they read, which is then
    taken from memory once."""
    program = tl.program_id(0)
    return (program // count).to(tl.int64), program % count


@triton.jit
def _chunk(block, chunks, heads, CHUNK: tl.constexpr):
    """The first token of a chunk of a head, and where that head begins in it."""
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    return token, token * heads + row % heads


@triton.jit
def _tile(tensor, start, rows, heads, dims, dim):
    """Tokens of one head, some of their channels."""
    place = rows[:, None] * (heads * dim) + dims[None, :]
    return tl.load(tensor + start * dim + place, mask=(dims < dim)[None, :], other=0.0)


@triton.jit
def _put_tile(tensor, start, rows, heads, dims, dim, what):
    place = rows[:, None] * (heads * dim) + dims[None, :]
    tl.store(tensor + start * dim + place, what.to(tensor.dtype.element_ty), mask=(dims < dim)[None, :])


@triton.jit
def _fades(sums, start, rows, heads, dims, dim, DECAY: tl.constexpr):
    """The running sums of the decay's logarithm, by token, in one channel or in each."""
    if DECAY == BY_CHANNEL:
        return _tile(sums, start, rows, heads, dims, dim)
    else:
        return tl.load(sums + start + rows * heads)[:, None]


@triton.jit
def _fade_at(sums, start, row, heads, dims, dim, DECAY: tl.constexpr):
    """The same at one token, for each channel."""
    if DECAY == BY_CHANNEL:
        return tl.load(sums + (start + row * heads) * dim + dims, mask=dims < dim, other=0.0)
    else:
        return tl.load(sums + start + row * heads + dims * 0)


@triton.jit
def _matrix(tensor, start, rows, columns, height, width):
    """Part of a matrix of which ``start`` come before, zero beyond its edges."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    return tl.load(tensor + start * height * width + place, mask=inside, other=0.0)


@triton.jit
def _put_matrix(tensor, start, rows, columns, height, width, what):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows[:, None] * width + columns[None, :]
    tl.store(tensor + start * height * width + place, what.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _faded(x, exponent):
    return x * tl.exp(tl.minimum(exponent, 0.0))


@triton.jit
def _mild(sums, start, heads, keys, first, last, CHUNK: tl.constexpr, KEYS: tl.constexpr):
    """Whether channels fade so little over a chunk that what is left may be split anywhere: into factors that count
    from the middle of it, and are far from the ends of what bfloat16 holds."""
    most = 0.0
    for channel in range(first, last, KEYS):
        kd = channel + tl.arange(0, KEYS)
        end = _fade_at(sums, start, CHUNK - 1, heads, kd, keys, BY_CHANNEL)
        most = tl.maximum(most, tl.max(_fade_at(sums, start, 0, heads, kd, keys, BY_CHANNEL) - end))
    return most <= MILD


@triton.jit
def _middle(sums, start, heads, dims, dim, CHUNK: tl.constexpr):
    end = _fade_at(sums, start, CHUNK - 1, heads, dims, dim, BY_CHANNEL)
    return (0.5 * (_fade_at(sums, start, 0, heads, dims, dim, BY_CHANNEL) + end))[None, :]


@triton.jit
def _running(
    x, given, out, least, columns,
    BACK: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Running sums within a chunk of what is no less than the least; or, back, the slopes in it from those in them."""
    token = tl.program_id(0).to(tl.int64) * CHUNK
    here, column = tl.arange(0, CHUNK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    place = token * columns + here[:, None] * columns + column[None, :]
    one = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        found = tl.cumsum(tl.load(given + place, mask=inside, other=0.0), 0, reverse=True)
        found = tl.where(one >= least, found, 0.0)
    else:
        found = tl.cumsum(tl.maximum(one, least), 0)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=inside)


def summed(decay: Tensor, slope: Tensor | None = None) -> Tensor:
    """The running sums of a decay's logarithm within chunks; with their slopes, the slopes in the decay."""
    columns = decay[0, 0].numel()
    wide = min(64, triton.next_power_of_2(columns))
    out = torch.empty_like(decay, dtype=torch.float32 if slope is None else decay.dtype)
    _running[(decay.shape[0] * decay.shape[1] // CHUNK, triton.cdiv(columns, wide))](
        decay, decay if slope is None else slope, out, FAINTEST, columns,
        BACK=slope is not None, CHUNK=CHUNK, COLUMNS=wide, num_warps=4,
    )  # fmt: skip
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs a device runs at the same time, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
