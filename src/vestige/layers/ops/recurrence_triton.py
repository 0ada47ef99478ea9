r"""Triton form of the recurrence without the delta rule, for CUDA in bfloat16, with its backward pass.

The chunks of :mod:`vestige.layers.ops.recurrence`, in three kernels: one walks over the chunks and keeps the state
before each, one works out the scores :math:`A` within a chunk, one reads. Keys are taken a block of channels at a time,
so they may be as wide as they like. With :math:`R` the gradient of the state after a chunk, backward

.. math::
    dA = s\,dO\,V^\top, \qquad dV = s\,A^\top dO + (K e^{b_C - b}) R, \qquad
    dQ = s\,e^{b} (dO\,S_0^\top) + \dots, \qquad dK = e^{b_C - b} (V R^\top) + \dots, \qquad
    db = Q\,dQ - K\,dK + [\text{last token}] \textstyle\sum_v R\,S_C ,

where dots stand for what runs through :math:`A`. With a decay per channel, :math:`A` is no plain product: rows are
taken in small blocks, whose decay against earlier ones is counted from their common edge, and within a block column by
column. Every exponent is at most zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vestige.layers.ops.recurrence import FAINTEST, Drive, serve

__all__ = ["recurrence_cuda"]

CHUNK = 64
ROWS = 16
NO_DECAY, BY_HEAD, BY_CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
    """Part of a matrix of which ``start`` come before."""
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


@triton.jit
def _states(
    k, v, sums, number, first, states, last, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and after the last."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    kd, vd = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    here = tl.arange(0, CHUNK)
    state = _matrix(first, row, kd, vd, keys, values)
    for n in range(0, chunks):
        _put_matrix(states, row * (chunks + 1) + n, kd, vd, keys, values, state)
        token = (batch * chunks + n) * CHUNK
        start = token * heads + head
        kt, vt = _tile(k, start, here, heads, kd, keys), _tile(v, start, here, heads, vd, values)
        if DECAY != NO_DECAY:
            end = _fade_at(sums, start, CHUNK - 1, heads, kd, keys, DECAY)
            kt = _faded(kt, end[None, :] - _fades(sums, start, here, heads, kd, keys, DECAY))
            state = _faded(state, end[:, None])
        if PACKED:
            part = tl.load(number + token + here)
            final = tl.load(number + token + CHUNK - 1)
            kt = tl.where((part == final)[:, None], kt, 0.0)
            state = tl.where(final == 0, state, 0.0)
        state += tl.dot(tl.trans(kt.to(vt.dtype)), vt)
    _put_matrix(states, row * (chunks + 1) + chunks, kd, vd, keys, values, state)
    _put_matrix(last, row, kd, vd, keys, values, state)


@triton.jit
def _scores(
    q, k, sums, number, scores, chunks, heads, keys,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some rows of the scores within a chunk."""
    block = tl.program_id(0).to(tl.int64)
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    start = token * heads + row % heads
    edge = tl.program_id(1) * ROWS
    mine, here = edge + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    found = tl.zeros([ROWS, CHUNK], tl.float32)
    for channel in range(0, keys, KEYS):
        kd = channel + tl.arange(0, KEYS)
        qt, kt = _tile(q, start, mine, heads, kd, keys), _tile(k, start, here, heads, kd, keys)
        if DECAY == BY_CHANNEL:
            b = _tile(sums, start, mine, heads, kd, keys)
            common = _fade_at(sums, start, edge, heads, kd, keys, DECAY)[None, :]
            earlier = _faded(kt, common - _tile(sums, start, here, heads, kd, keys)).to(kt.dtype)
            product = tl.dot(_faded(qt, b - common).to(kt.dtype), tl.trans(earlier))
            found += tl.where((here < edge)[None, :], product, 0.0)
            for j in range(0, ROWS):
                one = tl.load(k + (start + (edge + j) * heads) * keys + kd, mask=kd < keys, other=0.0)
                gap = b - _fade_at(sums, start, edge + j, heads, kd, keys, DECAY)[None, :]
                column = tl.sum(_faded(qt * one.to(tl.float32)[None, :], gap), 1)
                found += tl.where((here == edge + j)[None, :], column[:, None], 0.0)
        else:
            found += tl.dot(qt, tl.trans(kt))
    if DECAY == BY_HEAD:
        at, there = tl.load(sums + start + mine * heads), tl.load(sums + start + here * heads)
        found = _faded(found, at[:, None] - there[None, :])
    seen = here[None, :] <= mine[:, None]
    if PACKED:
        seen = seen & (tl.load(number + token + mine)[:, None] == tl.load(number + token + here)[None, :])
    _put_matrix(scores, block, mine, here, CHUNK, CHUNK, tl.where(seen, found, 0.0))


@triton.jit
def _read(
    q, v, sums, number, scores, states, out, scale, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk read, of the state before it and of each other."""
    block = tl.program_id(0).to(tl.int64)
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    start = token * heads + row % heads
    vd, here = tl.program_id(1) * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
    found = tl.dot(_matrix(scores, block, here, here, CHUNK, CHUNK), _tile(v, start, here, heads, vd, values))
    for channel in range(0, keys, KEYS):
        kd = channel + tl.arange(0, KEYS)
        qt = _tile(q, start, here, heads, kd, keys)
        state = _matrix(states, row * (chunks + 1) + n, kd, vd, keys, values)
        if DECAY != NO_DECAY:
            qt = _faded(qt, _fades(sums, start, here, heads, kd, keys, DECAY)).to(qt.dtype)
        if PACKED:
            qt = tl.where((tl.load(number + token + here) == 0)[:, None], qt, 0.0)
        found += tl.dot(qt.to(state.dtype), state)
    _put_tile(out, start, here, heads, vd, values, found * scale)


@triton.jit
def _later(
    q, sums, number, d_out, d_last, d_states, d_first, scale, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, and before the first: the walk backwards."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    kd, vd = tl.program_id(1) * KEYS + tl.arange(0, KEYS), tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    here = tl.arange(0, CHUNK)
    slope = _matrix(d_last, row, kd, vd, keys, values)
    for back in range(0, chunks):
        n = chunks - 1 - back
        _put_matrix(d_states, row * chunks + n, kd, vd, keys, values, slope)
        token = (batch * chunks + n) * CHUNK
        start = token * heads + head
        qt, do = _tile(q, start, here, heads, kd, keys), _tile(d_out, start, here, heads, vd, values)
        if DECAY != NO_DECAY:
            qt = _faded(qt, _fades(sums, start, here, heads, kd, keys, DECAY))
            slope = _faded(slope, _fade_at(sums, start, CHUNK - 1, heads, kd, keys, DECAY)[:, None])
        if PACKED:
            qt = tl.where((tl.load(number + token + here) == 0)[:, None], qt, 0.0)
            slope = tl.where(tl.load(number + token + CHUNK - 1) == 0, slope, 0.0)
        slope += scale * tl.dot(tl.trans(qt.to(do.dtype)), do)
    _put_matrix(d_first, row, kd, vd, keys, values, slope)


@triton.jit
def _d_scores(
    v, number, d_out, d_scores, scale, chunks, heads, values,
    PACKED: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    start = token * heads + row % heads
    here = tl.arange(0, CHUNK)
    found = tl.zeros([CHUNK, CHUNK], tl.float32)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        vt, do = _tile(v, start, here, heads, vd, values), _tile(d_out, start, here, heads, vd, values)
        found += tl.dot(do, tl.trans(vt))
    seen = here[None, :] <= here[:, None]
    if PACKED:
        part = tl.load(number + token + here)
        seen = seen & (part[:, None] == part[None, :])
    _put_matrix(d_scores, block, here, here, CHUNK, CHUNK, tl.where(seen, found * scale, 0.0))


@triton.jit
def _d_values(
    k, sums, number, scores, d_out, d_states, d_v, scale, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    start = token * heads + row % heads
    vd, here = tl.program_id(1) * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
    seen = _matrix(scores, block, here, here, CHUNK, CHUNK)
    found = scale * tl.dot(tl.trans(seen), _tile(d_out, start, here, heads, vd, values))
    for channel in range(0, keys, KEYS):
        kd = channel + tl.arange(0, KEYS)
        kt = _tile(k, start, here, heads, kd, keys)
        slope = _matrix(d_states, row * chunks + n, kd, vd, keys, values)
        if DECAY != NO_DECAY:
            end = _fade_at(sums, start, CHUNK - 1, heads, kd, keys, DECAY)
            kt = _faded(kt, end[None, :] - _fades(sums, start, here, heads, kd, keys, DECAY)).to(kt.dtype)
        if PACKED:
            final = tl.load(number + token + CHUNK - 1)
            kt = tl.where((tl.load(number + token + here) == final)[:, None], kt, 0.0)
        found += tl.dot(kt.to(slope.dtype), slope)
    _put_tile(d_v, start, here, heads, vd, values, found)


@triton.jit
def _d_keys(
    q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums,
    scale, chunks, heads, keys, values, tokens,
    DECAY: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of queries, keys and decays, for some tokens of a chunk and some channels."""
    block = tl.program_id(0).to(tl.int64)
    row, n = block // chunks, block % chunks
    token = (row // heads * chunks + n) * CHUNK
    start = token * heads + row % heads
    edge = tl.program_id(1) * ROWS
    mine, here = edge + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    kd = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    dq, dk = tl.zeros([ROWS, KEYS], tl.float32), tl.zeros([ROWS, KEYS], tl.float32)
    through = tl.zeros([KEYS], tl.float32)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        vt, do = _tile(v, start, mine, heads, vd, values), _tile(d_out, start, mine, heads, vd, values)
        state = _matrix(states, row * (chunks + 1) + n, kd, vd, keys, values)
        slope = _matrix(d_states, row * chunks + n, kd, vd, keys, values)
        dq += tl.dot(do, tl.trans(state))
        dk += tl.dot(vt, tl.trans(slope))
        if DECAY != NO_DECAY:
            if ROWS < CHUNK:
                state = _matrix(states, row * (chunks + 1) + n + 1, kd, vd, keys, values)
            through += tl.sum(slope.to(tl.float32) * state.to(tl.float32), 1)
    dq *= scale
    if DECAY != NO_DECAY:
        b = _fades(sums, start, mine, heads, kd, keys, DECAY)
        end = _fade_at(sums, start, CHUNK - 1, heads, kd, keys, DECAY)
        dq, dk = _faded(dq, b), _faded(dk, end[None, :] - b)
    if PACKED:
        part, final = tl.load(number + token + mine), tl.load(number + token + CHUNK - 1)
        dq = tl.where((part == 0)[:, None], dq, 0.0)
        dk = tl.where((part == final)[:, None], dk, 0.0)
    qt, kt = _tile(q, start, mine, heads, kd, keys), _tile(k, start, mine, heads, kd, keys)
    if DECAY != NO_DECAY and ROWS == CHUNK:  # of the state after the chunk: the rest of that before, and what was added
        through = _faded(through, end)
        if PACKED:
            through = tl.where(final == 0, through, 0.0)
        through += tl.sum(kt.to(tl.float32) * dk, 0)

    square = d_scores + block * CHUNK * CHUNK
    asked = tl.load(square + mine[:, None] * CHUNK + here[None, :])  # by the tokens of this program, of all
    given = tl.load(square + here[None, :] * CHUNK + mine[:, None])  # by all, of the tokens of this program
    qa, ka = _tile(q, start, here, heads, kd, keys), _tile(k, start, here, heads, kd, keys)
    if DECAY == BY_CHANNEL:
        every = _tile(sums, start, here, heads, kd, keys)
        low = _fade_at(sums, start, edge, heads, kd, keys, DECAY)[None, :]
        high = _fade_at(sums, start, edge + ROWS - 1, heads, kd, keys, DECAY)[None, :]
        earlier, later = _faded(ka, low - every).to(ka.dtype), _faded(qa, every - high).to(qa.dtype)
        asked = tl.where((here < edge)[None, :], asked, 0.0).to(ka.dtype)
        given = tl.where((here >= edge + ROWS)[None, :], given, 0.0).to(qa.dtype)
        dq += _faded(tl.dot(asked, earlier), b - low)
        dk += _faded(tl.dot(given, later), high - b)
        for j in range(0, ROWS):
            one = (start + (edge + j) * heads) * keys + kd
            qj = tl.load(q + one, mask=kd < keys, other=0.0).to(tl.float32)[None, :]
            kj = tl.load(k + one, mask=kd < keys, other=0.0).to(tl.float32)[None, :]
            bj = tl.load(sums + one, mask=kd < keys, other=0.0)[None, :]
            down = tl.load(square + mine * CHUNK + edge + j).to(tl.float32)[:, None]
            along = tl.load(square + (edge + j) * CHUNK + mine).to(tl.float32)[:, None]
            dq += _faded(down * kj, b - bj)
            dk += _faded(along * qj, bj - b)
    else:
        if DECAY == BY_HEAD:
            there = tl.load(sums + start + here * heads)[None, :]
            asked, given = _faded(asked, b - there).to(ka.dtype), _faded(given, there - b).to(qa.dtype)
        dq += tl.dot(asked, ka)
        dk += tl.dot(given, qa)
    _put_tile(d_q, start, mine, heads, kd, keys, dq)
    _put_tile(d_k, start, mine, heads, kd, keys, dk)
    if DECAY != NO_DECAY:
        db = qt.to(tl.float32) * dq - kt.to(tl.float32) * dk
        db += tl.where((mine == CHUNK - 1)[:, None], through[None, :], 0.0)
        if DECAY == BY_CHANNEL:
            _put_tile(d_sums, start, mine, heads, kd, keys, db)
        else:
            one = tl.sum(tl.where((kd < keys)[None, :], db, 0.0), 1)
            tl.store(d_sums + tl.program_id(2) * tokens * heads + start + mine * heads, one)


class _Chunks(torch.autograd.Function):
    """All in whole chunks; ``number`` counts the packed sequences that begin within a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        number: Tensor | None,
        state: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        size = Size(q, v, decay, number)
        sums = None if decay is None else summed(decay)
        b, part = (q if t is None else t for t in (sums, number))
        scores = v.new_empty(size.blocks, CHUNK, CHUNK)
        states = v.new_empty(size.rows, size.chunks + 1, size.keys, size.values)
        out, last = torch.empty_like(v), torch.empty_like(state)
        _states[size.walk](k, v, b, part, state, states, last, *size.shape, **size.walking)
        _scores[size.scoring](q, k, b, part, scores, *size.shape[:3], **size.scored)
        _read[size.reading](q, v, b, part, scores, states, out, scale, *size.shape, **size.tiles)
        ctx.save_for_backward(q, k, v, decay, sums, number, scores, states)
        ctx.scale = scale
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> Any:  # type: ignore[override]
        q, k, v, decay, sums, number, scores, states = ctx.saved_tensors
        size = Size(q, v, sums, number)
        b, part = (q if t is None else t for t in (sums, number))
        d_out, d_last = d_out.contiguous(), d_last.contiguous()
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_scores, d_first = torch.empty_like(scores), torch.empty_like(d_last)
        d_states = v.new_empty(size.rows, size.chunks, size.keys, size.values)
        d_sums = None
        if sums is not None:
            d_sums = torch.empty_like(sums) if sums.dim() == 4 else sums.new_empty(size.parts, *sums.shape)
        _later[size.walk](q, b, part, d_out, d_last, d_states, d_first, ctx.scale, *size.shape, **size.walking)
        _d_scores[(size.blocks,)](
            v, part, d_out, d_scores, ctx.scale, size.chunks, size.heads, size.values,
            PACKED=size.how["PACKED"], CHUNK=CHUNK, VALUES=size.tiles["VALUES"], num_warps=4,
        )  # fmt: skip
        _d_values[size.reading](k, b, part, scores, d_out, d_states, d_v, ctx.scale, *size.shape, **size.tiles)
        _d_keys[size.keying](
            q, k, v, b, part, states, d_out, d_scores, d_states, d_q, d_k, q if d_sums is None else d_sums,
            ctx.scale, *size.shape, size.tokens, **size.keyed,
        )  # fmt: skip
        d_decay = None
        if d_sums is not None:
            d_decay = summed(decay, d_sums if decay.dim() == 4 else d_sums.sum(0))
        return d_q, d_k, d_v, d_decay, None, d_first, None


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


class Size:
    """The numbers that the kernels of one call share."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor | None, number: Tensor | None) -> None:
        batch, length, self.heads, self.keys = q.shape
        self.values = v.shape[-1]
        self.chunks, self.rows = length // CHUNK, batch * self.heads
        self.blocks = self.rows * self.chunks
        self.shape = (self.chunks, self.heads, self.keys, self.values)
        kind = NO_DECAY if decay is None else BY_CHANNEL if decay.dim() == 4 else BY_HEAD
        self.how = {"DECAY": kind.value, "PACKED": number is not None, "CHUNK": CHUNK}
        wide_k, wide_v = (max(16, min(64, triton.next_power_of_2(n))) for n in (self.keys, self.values))
        self.tiles = {**self.how, "KEYS": wide_k, "VALUES": wide_v, "num_warps": 4}
        self.reading = (self.blocks, triton.cdiv(self.values, wide_v))
        narrow = min(32, wide_v)
        self.walk = (self.rows, triton.cdiv(self.keys, wide_k), triton.cdiv(self.values, narrow))
        self.walking = {**self.tiles, "VALUES": narrow, "num_warps": 8}
        self.tokens = batch * length
        # With a decay per channel a few rows and columns at a time: many tiles are held at once.
        rows, few = (ROWS, min(32, wide_k)) if kind == BY_CHANNEL else (CHUNK, wide_k)
        self.parts = triton.cdiv(self.keys, few)
        self.scoring, self.keying = (self.blocks, CHUNK // rows), (self.blocks, CHUNK // rows, self.parts)
        self.scored = {**self.how, "ROWS": rows, "KEYS": few, "num_warps": 4}
        self.keyed = {**self.tiles, "ROWS": rows, "KEYS": few, "num_warps": 8 if few == 64 else 4}


def recurrence_cuda(drive: Drive, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`vestige.layers.ops.recurrence.recurrence`; no delta rule, and sums in float32."""
    return by_chunks(_Chunks.apply, drive, state, starts)


def by_chunks(
    run: Callable[..., tuple[Tensor, Tensor]], drive: Drive, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What kernels for whole chunks make of a drive of any length, with a state or packed sequences.

    Args:
        run: takes queries, keys, values, the decay, the rate if there is one, the count of sequences that begin within
            a chunk, the state and the scale; gives what is read and the state.
    """
    batch, length, heads, values = drive.v.shape
    missing = -length % CHUNK

    def whole(tensor: Tensor) -> Tensor:
        """Filled up to whole chunks."""
        return (F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing]) if missing else tensor).contiguous()

    with torch.cuda.device_of(drive.v), torch.autocast(drive.v.device.type, enabled=False):
        kind = drive.v.dtype
        q, k = (whole(serve(t, heads, 2).to(kind)) for t in (drive.q, drive.k))
        decay = drive.decay
        if decay is not None:
            decay = whole(decay.expand(batch, length, heads) if decay.dim() == 1 else decay)
        beta = [] if drive.beta is None else [whole(drive.beta)]
        number = None
        if starts is not None:
            number = whole(starts.int()).unflatten(1, (-1, CHUNK)).cumsum(2, dtype=torch.int32).flatten(1)
        first = drive.v.new_zeros(batch, heads, k.shape[-1], values, dtype=torch.float32) if state is None else state
        out, last = run(q, k, whole(drive.v), decay, *beta, number, first.float().contiguous(), drive.scale)
    return out[:, :length], last
