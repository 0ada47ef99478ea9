r"""Triton form of the recurrence without the delta rule, for CUDA in bfloat16, with its backward pass.

The chunks of :mod:`vestige.layers.ops.recurrence`, in three kernels: one walks over the chunks and keeps the state
before each, one works out the scores :math:`A` within a chunk, one reads. Keys are taken a block of channels at a time,
so they may be as wide as they like. With :math:`R` the gradient of the state after a chunk, backward

.. math::
    dA = s\,dO\,V^\top, \qquad dV = s\,A^\top dO + (K e^{b_C - b}) R, \qquad
    dQ = s\,e^{b} (dO\,S_0^\top) + \dots, \qquad dK = e^{b_C - b} (V R^\top) + \dots, \qquad
    db = Q\,dQ - K\,dK + [\text{last token}] \textstyle\sum_v R\,S_C ,

where dots stand for what runs through :math:`A`. With a decay per channel, :math:`A` is one product of factors that
count from the middle of the chunk, where these are far from overflow. Where the decay is too strong for that, rows are
taken in small blocks, whose decay against earlier ones is counted from their common edge, and within a block column by
column: every exponent is then at most zero.
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

from vestige.layers.ops.recurrence import Drive, serve
from vestige.layers.ops.tiles_triton import (
    BY_CHANNEL,
    BY_HEAD,
    CHUNK,
    NO_DECAY,
    _chunk,
    _fade_at,
    _faded,
    _fades,
    _matrix,
    _middle,
    _mild,
    _placed,
    _put_matrix,
    _put_tile,
    _tile,
    processors,
    summed,
)

__all__ = ["recurrence_cuda"]

ROWS = 16


@triton.jit
def _states(
    k, v, sums, number, first, states, last, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and after the last."""
    parts = tl.cdiv(values, VALUES)
    row, part = _placed(tl.cdiv(keys, KEYS) * parts)
    batch, head = row // heads, row % heads
    kd, vd = part // parts * KEYS + tl.arange(0, KEYS), part % parts * VALUES + tl.arange(0, VALUES)
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
            final = tl.load(number + token + CHUNK - 1)
            kt = tl.where((tl.load(number + token + here) == final)[:, None], kt, 0.0)
            state = tl.where(final == 0, state, 0.0)
        state += tl.dot(tl.trans(kt.to(vt.dtype)), vt)
    _put_matrix(states, row * (chunks + 1) + chunks, kd, vd, keys, values, state)
    _put_matrix(last, row, kd, vd, keys, values, state)


@triton.jit
def _scores_of(
    q, k, sums, number, scores, block, token, start, edge, heads, keys,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some rows of the scores within a chunk; with a decay per channel all of them where it is mild."""
    mine, here = edge + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    found = tl.zeros([ROWS, CHUNK], tl.float32)
    for channel in range(0, keys, KEYS):
        kd = channel + tl.arange(0, KEYS)
        qt, kt = _tile(q, start, mine, heads, kd, keys), _tile(k, start, here, heads, kd, keys)
        if DECAY == BY_CHANNEL:
            b = _tile(sums, start, mine, heads, kd, keys)
            if ROWS == CHUNK:
                middle = _middle(sums, start, heads, kd, keys, CHUNK)
                kt, qt = (kt * tl.exp(middle - b)).to(kt.dtype), (qt * tl.exp(b - middle)).to(kt.dtype)
                found += tl.dot(qt, tl.trans(kt))
            else:
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
def _scores(
    q, k, sums, number, scores, chunks, heads, keys,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The scores within a chunk."""
    block = tl.program_id(0).to(tl.int64)
    token, start = _chunk(block, chunks, heads, CHUNK)
    if DECAY != BY_CHANNEL:  # noqa: SIM114 - this is settled by the compiler
        _scores_of(q, k, sums, number, scores, block, token, start, 0, heads, keys, DECAY, PACKED, CHUNK, CHUNK, KEYS)
    elif _mild(sums, start, heads, keys, 0, keys, CHUNK, KEYS):
        _scores_of(q, k, sums, number, scores, block, token, start, 0, heads, keys, DECAY, PACKED, CHUNK, CHUNK, KEYS)
    else:
        for edge in range(0, CHUNK, ROWS):
            _scores_of(
                q, k, sums, number, scores, block, token, start, edge, heads, keys, DECAY, PACKED, CHUNK, ROWS, KEYS
            )


@triton.jit
def _read(
    q, v, sums, number, scores, states, out, scale, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk read, of the state before it and of each other."""
    block, part = _placed(tl.cdiv(values, VALUES))
    row, n = block // chunks, block % chunks
    token, start = _chunk(block, chunks, heads, CHUNK)
    vd, here = part * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
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
    parts = tl.cdiv(values, VALUES)
    row, part = _placed(tl.cdiv(keys, KEYS) * parts)
    batch, head = row // heads, row % heads
    kd, vd = part // parts * KEYS + tl.arange(0, KEYS), part % parts * VALUES + tl.arange(0, VALUES)
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
    token, start = _chunk(block, chunks, heads, CHUNK)
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
    block, part = _placed(tl.cdiv(values, VALUES))
    row, n = block // chunks, block % chunks
    token, start = _chunk(block, chunks, heads, CHUNK)
    vd, here = part * VALUES + tl.arange(0, VALUES), tl.arange(0, CHUNK)
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
def _d_keys_of(
    q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums, block, part, edge,
    scale, chunks, heads, keys, values, tokens,
    DECAY: tl.constexpr, LEARNT: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """For some tokens of a chunk; with a decay per channel for all of them where it is mild."""
    row, n = block // chunks, block % chunks
    token, start = _chunk(block, chunks, heads, CHUNK)
    mine, here = edge + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    kd = part * KEYS + tl.arange(0, KEYS)
    dq, dk = tl.zeros([ROWS, KEYS], tl.float32), tl.zeros([ROWS, KEYS], tl.float32)
    through = tl.zeros([KEYS], tl.float32)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        vt, do = _tile(v, start, mine, heads, vd, values), _tile(d_out, start, mine, heads, vd, values)
        state = _matrix(states, row * (chunks + 1) + n, kd, vd, keys, values)
        slope = _matrix(d_states, row * chunks + n, kd, vd, keys, values)
        dq += tl.dot(do, tl.trans(state))
        dk += tl.dot(vt, tl.trans(slope))
        if LEARNT and ROWS == CHUNK:
            through += tl.sum(slope.to(tl.float32) * state.to(tl.float32), 1)
    dq *= scale
    if DECAY != NO_DECAY:
        b = _fades(sums, start, mine, heads, kd, keys, DECAY)
        end = _fade_at(sums, start, CHUNK - 1, heads, kd, keys, DECAY)
        dq, dk = _faded(dq, b), _faded(dk, end[None, :] - b)
    if PACKED:
        text, final = tl.load(number + token + mine), tl.load(number + token + CHUNK - 1)
        dq = tl.where((text == 0)[:, None], dq, 0.0)
        dk = tl.where((text == final)[:, None], dk, 0.0)
    qt, kt = _tile(q, start, mine, heads, kd, keys), _tile(k, start, mine, heads, kd, keys)
    # Through the state after the chunk: what is left of that before, and what was added; or, where some tokens follow
    # others, that state itself, with the last of them.
    if LEARNT and ROWS == CHUNK:
        through = _faded(through, end)
        if PACKED:
            through = tl.where(final == 0, through, 0.0)
        through += tl.sum(kt.to(tl.float32) * dk, 0)
    if LEARNT and ROWS < CHUNK:
        last = edge + ROWS == CHUNK
        if last:
            for channel in range(0, values, VALUES):
                vd = channel + tl.arange(0, VALUES)
                after = _matrix(states, row * (chunks + 1) + n + 1, kd, vd, keys, values).to(tl.float32)
                through += tl.sum(after * _matrix(d_states, row * chunks + n, kd, vd, keys, values).to(tl.float32), 1)

    square = d_scores + block * CHUNK * CHUNK
    asked = tl.load(square + mine[:, None] * CHUNK + here[None, :])  # by these tokens, of all
    given = tl.load(square + here[None, :] * CHUNK + mine[:, None])  # by all, of these tokens
    qa, ka = _tile(q, start, here, heads, kd, keys), _tile(k, start, here, heads, kd, keys)
    if DECAY == BY_CHANNEL and ROWS == CHUNK:
        middle = _middle(sums, start, heads, kd, keys, CHUNK)
        rise, fall = tl.exp(middle - b), tl.exp(b - middle)
        dq += fall * tl.dot(asked, (ka * rise).to(ka.dtype))
        dk += rise * tl.dot(given, (qa * fall).to(qa.dtype))
    elif DECAY == BY_CHANNEL:
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
    if LEARNT:
        db = qt.to(tl.float32) * dq - kt.to(tl.float32) * dk
        db += tl.where((mine == CHUNK - 1)[:, None], through[None, :], 0.0)
        if DECAY == BY_CHANNEL:
            _put_tile(d_sums, start, mine, heads, kd, keys, db)
        else:
            one = tl.sum(tl.where((kd < keys)[None, :], db, 0.0), 1)
            tl.store(d_sums + part.to(tl.int64) * tokens * heads + start + mine * heads, one)


@triton.jit
def _d_keys(
    q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums,
    scale, chunks, heads, keys, values, tokens,
    DECAY: tl.constexpr, LEARNT: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of queries, keys and, where they are learnt, of decays, for some channels."""
    block, part = _placed(tl.cdiv(keys, KEYS))
    row = block // chunks
    start = (row // heads * chunks + block % chunks) * CHUNK * heads + row % heads
    if DECAY != BY_CHANNEL:  # noqa: SIM114 - as above
        _d_keys_of(
            q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums, block, part, 0,
            scale, chunks, heads, keys, values, tokens, DECAY, LEARNT, PACKED, CHUNK, CHUNK, KEYS, VALUES,
        )  # fmt: skip
    elif _mild(sums, start, heads, keys, part * KEYS, part * KEYS + KEYS, CHUNK, KEYS):
        _d_keys_of(
            q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums, block, part, 0,
            scale, chunks, heads, keys, values, tokens, DECAY, LEARNT, PACKED, CHUNK, CHUNK, KEYS, VALUES,
        )  # fmt: skip
    else:
        for edge in range(0, CHUNK, ROWS):
            _d_keys_of(
                q, k, v, sums, number, states, d_out, d_scores, d_states, d_q, d_k, d_sums, block, part, edge,
                scale, chunks, heads, keys, values, tokens, DECAY, LEARNT, PACKED, CHUNK, ROWS, KEYS, VALUES,
            )  # fmt: skip


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
        if sums is not None and ctx.needs_input_grad[3]:
            d_sums = torch.empty_like(sums) if sums.dim() == 4 else sums.new_empty(size.parts, *sums.shape)
        _later[size.walk](q, b, part, d_out, d_last, d_states, d_first, ctx.scale, *size.shape, **size.walking)
        _d_scores[(size.blocks,)](
            v, part, d_out, d_scores, ctx.scale, size.chunks, size.heads, size.values, **size.within,
        )  # fmt: skip
        _d_values[size.reading](k, b, part, scores, d_out, d_states, d_v, ctx.scale, *size.shape, **size.tiles)
        _d_keys[size.keying](
            q, k, v, b, part, states, d_out, d_scores, d_states, d_q, d_k, q if d_sums is None else d_sums,
            ctx.scale, *size.shape, size.tokens, LEARNT=d_sums is not None, **size.keyed,
        )  # fmt: skip
        d_decay = None
        if d_sums is not None:
            d_decay = summed(decay, d_sums if decay.dim() == 4 else d_sums.sum(0))
        return d_q, d_k, d_v, d_decay, None, d_first, None


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
        self.within = {"PACKED": self.how["PACKED"], "CHUNK": CHUNK, "VALUES": wide_v, "num_warps": 4}
        self.reading = (self.blocks * triton.cdiv(self.values, wide_v),)
        walks = self.rows * triton.cdiv(self.keys, wide_k)
        if walks * triton.cdiv(self.values, wide_v) < processors(v.device):
            wide_v = min(32, wide_v)  # more programs where there are few rows to walk along
        self.walk = (walks * triton.cdiv(self.values, wide_v),)
        self.walking = {**self.tiles, "VALUES": wide_v, "num_warps": 8}
        self.tokens = batch * length
        self.parts = triton.cdiv(self.keys, wide_k)
        self.scoring, self.keying = (self.blocks,), (self.blocks * self.parts,)
        self.scored = {**self.how, "ROWS": ROWS, "KEYS": wide_k, "num_warps": 4}
        # With a decay per channel many tiles are held at once.
        self.keyed = {**self.tiles, "ROWS": ROWS, "num_warps": 8 if kind == BY_CHANNEL else 4}


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
