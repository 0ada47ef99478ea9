r"""Triton form of the recurrence with the delta rule, without decay or with one per head, and its backward pass.

As in :mod:`vestige.layers.ops.recurrence`, what the tokens of a chunk write is the solution of a triangular system,

.. math::
    (I + L)\, U = \beta (V - e^{b} K S_0), \qquad L = \operatorname{tril}(\beta\, e^{b_i - b_j} K K^\top, -1) .

One kernel inverts :math:`I + L` for every chunk at once, by blocks of twice the size again and again; one walks over
the chunks with the state; scores and reads are those of :mod:`vestige.layers.ops.recurrence_triton`, of :math:`U`
instead of :math:`V`. Backward, with :math:`R` the gradient of the state after a chunk, a walk gives

.. math::
    dU = s A^\top dO + (K e^{b_C - b}) R, \qquad
    dS_0 = e^{b_C} R + s (Q e^{b})^\top dO - (e^{b} \beta K)^\top dX, \qquad dX = (I + L)^{-\top} dU ,

and the rest is parallel: :math:`dV = \beta\, dX`, :math:`dL = -\operatorname{tril}(dX\, U^\top, -1)`, and for keys,
rates and decays what runs through :math:`L` and :math:`S_0`.

No product here takes the transpose of another product's result: on Hopper some versions of Triton get that wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.recurrence import Drive
from vestige.layers.ops.recurrence_triton import Size, _d_keys, _read, _scores, by_chunks
from vestige.layers.ops.tiles_triton import (
    CHUNK,
    NO_DECAY,
    _chunk,
    _faded,
    _fades,
    _matrix,
    _placed,
    _put_matrix,
    _put_tile,
    _tile,
    processors,
    summed,
)

__all__ = ["delta_cuda", "takes"]

WIDEST_KEY = 256  # a walk holds all channels of the keys at once


@triton.jit
def _solve(
    k, v, sums, number, beta, inverse, erased, written, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, HALVINGS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The inverse of the system of each chunk, and by it what its tokens would write: of values, and of the state."""
    block = tl.program_id(0).to(tl.int64)
    token, start = _chunk(block, chunks, heads, CHUNK)
    here = tl.arange(0, CHUNK)
    rate = tl.load(beta + start + here * heads).to(tl.float32)
    overlap = tl.zeros([CHUNK, CHUNK], tl.float32)
    for channel in range(0, keys, KEYS):
        kt = _tile(k, start, here, heads, channel + tl.arange(0, KEYS), keys)
        overlap += tl.dot(kt, tl.trans(kt))
    into = rate
    if DECAY != NO_DECAY:
        b = tl.load(sums + start + here * heads)
        overlap = _faded(overlap, b[:, None] - b[None, :])
        into = _faded(into, b)
    seen = here[None, :] < here[:, None]
    if PACKED:
        part = tl.load(number + token + here)
        seen = seen & (part[:, None] == part[None, :])
        into = tl.where(part == 0, into, 0.0)
    overlap = tl.where(seen, overlap * rate[:, None], 0.0)
    solved = tl.where(here[:, None] == here[None, :], 1.0, 0.0)
    solved -= tl.where(here[:, None] // 2 == here[None, :] // 2, overlap, 0.0)
    for half in tl.static_range(1, HALVINGS):
        whole = here[:, None] // (2 << half) == here[None, :] // (2 << half)
        apart = here[:, None] // (1 << half) != here[None, :] // (1 << half)
        corner = tl.where(whole & apart, overlap, 0.0)
        solved -= tl.dot(tl.dot(solved, corner), solved)
    _put_matrix(inverse, block, here, here, CHUNK, CHUNK, solved)
    weighed = (solved * rate[None, :]).to(v.dtype.element_ty)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        vt = _tile(v, start, here, heads, vd, values)
        _put_tile(written, start, here, heads, vd, values, tl.dot(weighed, vt))
    weighed = (solved * into[None, :]).to(k.dtype.element_ty)
    for channel in range(0, keys, KEYS):
        kd = channel + tl.arange(0, KEYS)
        kt = _tile(k, start, here, heads, kd, keys)
        _put_tile(erased, start, here, heads, kd, keys, tl.dot(weighed, kt))


@triton.jit
def _walk(
    k, sums, number, first, erased, written, states, last, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last, and what is written: less what the state held already."""
    row, share = _placed(tl.cdiv(values, VALUES))
    batch, head = row // heads, row % heads
    kd, vd = tl.arange(0, KEYS), share * VALUES + tl.arange(0, VALUES)
    here = tl.arange(0, CHUNK)
    state = _matrix(first, row, kd, vd, keys, values)
    for n in range(0, chunks):
        token = (batch * chunks + n) * CHUNK
        start = token * heads + head
        held = state.to(k.dtype.element_ty)
        _put_matrix(states, row * (chunks + 1) + n, kd, vd, keys, values, held)
        u = _tile(written, start, here, heads, vd, values)
        u = (u - tl.dot(_tile(erased, start, here, heads, kd, keys), held)).to(k.dtype.element_ty)
        _put_tile(written, start, here, heads, vd, values, u)
        kt = _tile(k, start, here, heads, kd, keys)
        if DECAY != NO_DECAY:
            end = tl.load(sums + start + (CHUNK - 1) * heads)
            kt = _faded(kt, end - _fades(sums, start, here, heads, kd, keys, DECAY)).to(k.dtype.element_ty)
            state = _faded(state, end)
        if PACKED:
            final = tl.load(number + token + CHUNK - 1)
            kt = tl.where((tl.load(number + token + here) == final)[:, None], kt, 0.0)
            state = tl.where(final == 0, state, 0.0)
        state += tl.dot(tl.trans(kt), u)
    _put_matrix(states, row * (chunks + 1) + chunks, kd, vd, keys, values, state)
    _put_matrix(last, row, kd, vd, keys, values, state)


@triton.jit
def _walk_back(
    q, k, sums, number, scores, erased, d_out, d_last, d_written, d_states, d_first, scale, chunks, heads, keys, values,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The gradients of the state after each chunk and before the first, and of what is written."""
    row, share = _placed(tl.cdiv(values, VALUES))
    batch, head = row // heads, row % heads
    kd, vd = tl.arange(0, KEYS), share * VALUES + tl.arange(0, VALUES)
    here = tl.arange(0, CHUNK)
    slope = _matrix(d_last, row, kd, vd, keys, values)
    for back in range(0, chunks):
        n = chunks - 1 - back
        token = (batch * chunks + n) * CHUNK
        start = token * heads + head
        held = slope.to(k.dtype.element_ty)
        _put_matrix(d_states, row * chunks + n, kd, vd, keys, values, held)
        qt, kt = _tile(q, start, here, heads, kd, keys), _tile(k, start, here, heads, kd, keys)
        do = _tile(d_out, start, here, heads, vd, values)
        if DECAY != NO_DECAY:
            b = _fades(sums, start, here, heads, kd, keys, DECAY)
            end = tl.load(sums + start + (CHUNK - 1) * heads)
            kt, qt = _faded(kt, end - b).to(k.dtype.element_ty), _faded(qt, b).to(k.dtype.element_ty)
            slope = _faded(slope, end)
        if PACKED:
            part, final = tl.load(number + token + here)[:, None], tl.load(number + token + CHUNK - 1)
            kt, qt = tl.where(part == final, kt, 0.0), tl.where(part == 0, qt, 0.0)
            slope = tl.where(final == 0, slope, 0.0)
        seen = _matrix(scores, row * chunks + n, here, here, CHUNK, CHUNK)
        du = scale * tl.dot(tl.trans(seen), do) + tl.dot(kt, held)
        du = du.to(k.dtype.element_ty)
        _put_tile(d_written, start, here, heads, vd, values, du)
        slope += scale * tl.dot(tl.trans(qt), do)
        slope -= tl.dot(tl.trans(_tile(erased, start, here, heads, kd, keys)), du)
    _put_matrix(d_first, row, kd, vd, keys, values, slope)


@triton.jit
def _d_within(
    v, number, beta, inverse, written, d_out, d_written, d_v, d_right, d_scores, d_overlap, d_beta, scale,
    chunks, heads, values, PACKED: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of scores, of the two sides of the system of a chunk, and of the values."""
    block = tl.program_id(0).to(tl.int64)
    token, start = _chunk(block, chunks, heads, CHUNK)
    here = tl.arange(0, CHUNK)
    rate = tl.load(beta + start + here * heads).to(tl.float32)
    back = tl.load(inverse + block * CHUNK * CHUNK + here[None, :] * CHUNK + here[:, None])
    asked, solved = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    through = tl.zeros([CHUNK], tl.float32)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        u = _tile(written, start, here, heads, vd, values)
        asked += tl.dot(_tile(d_out, start, here, heads, vd, values), tl.trans(u))
        slope = tl.dot(back, _tile(d_written, start, here, heads, vd, values))
        solved -= tl.dot(slope.to(u.dtype), tl.trans(u))
        through += tl.sum(slope * _tile(v, start, here, heads, vd, values).to(tl.float32), 1)
        _put_tile(d_right, start, here, heads, vd, values, slope)
        _put_tile(d_v, start, here, heads, vd, values, slope * rate[:, None])
    seen = here[None, :] <= here[:, None]
    if PACKED:
        part = tl.load(number + token + here)
        seen = seen & (part[:, None] == part[None, :])
    _put_matrix(d_scores, block, here, here, CHUNK, CHUNK, tl.where(seen, asked * scale, 0.0))
    seen = seen & (here[None, :] != here[:, None])
    _put_matrix(d_overlap, block, here, here, CHUNK, CHUNK, tl.where(seen, solved, 0.0))
    tl.store(d_beta + start + here * heads, through)


@triton.jit
def _d_erasing(
    k, sums, number, beta, states, d_right, d_overlap, d_k, d_sums, d_beta, chunks, heads, keys, values, tokens,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Of keys, decays and rates, through the system; added to those of the keys that are there."""
    block, part = _placed(tl.cdiv(keys, KEYS))
    row, n = block // chunks, block % chunks
    token, start = _chunk(block, chunks, heads, CHUNK)
    here, kd = tl.arange(0, CHUNK), part * KEYS + tl.arange(0, KEYS)
    rate = tl.load(beta + start + here * heads).to(tl.float32)
    asks = tl.zeros([CHUNK, KEYS], tl.float32)
    for channel in range(0, values, VALUES):
        vd = channel + tl.arange(0, VALUES)
        state = _matrix(states, row * (chunks + 1) + n, kd, vd, keys, values)
        asks -= tl.dot(_tile(d_right, start, here, heads, vd, values), tl.trans(state))
    square = d_overlap + block * CHUNK * CHUNK
    asked = tl.load(square + here[:, None] * CHUNK + here[None, :]).to(tl.float32)
    given = tl.load(square + here[None, :] * CHUNK + here[:, None]).to(tl.float32) * rate[None, :]
    if DECAY != NO_DECAY:
        b = tl.load(sums + start + here * heads)
        asks = _faded(asks, b[:, None])
        gap = b[:, None] - b[None, :]
        asked, given = _faded(asked, gap), _faded(given, -gap)
    if PACKED:
        asks = tl.where((tl.load(number + token + here) == 0)[:, None], asks, 0.0)
    kt = _tile(k, start, here, heads, kd, keys)
    asks += tl.dot(asked.to(kt.dtype), kt)
    gives = tl.dot(given.to(kt.dtype), kt)
    there = _tile(d_k, start, here, heads, kd, keys).to(tl.float32)
    _put_tile(d_k, start, here, heads, kd, keys, there + rate[:, None] * asks + gives)
    share = start + here * heads + part.to(tl.int64) * tokens * heads
    mine = tl.sum(asks * kt.to(tl.float32), 1)
    tl.store(d_beta + share, mine)
    if DECAY != NO_DECAY:
        tl.store(d_sums + share, rate * mine - tl.sum(gives * kt.to(tl.float32), 1))


class _Chunks(torch.autograd.Function):
    """All in whole chunks; ``number`` counts the packed sequences that begin within a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor,
        number: Tensor | None,
        state: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        size = _Size(q, v, decay, number)
        sums = None if decay is None else summed(decay)
        b, part = (q if t is None else t for t in (sums, number))
        inverse, scores = (v.new_empty(size.blocks, CHUNK, CHUNK) for _ in range(2))
        states = v.new_empty(size.rows, size.chunks + 1, size.keys, size.values)
        out, written, erased, last = (torch.empty_like(t) for t in (v, v, k, state))
        _solve[(size.blocks,)](k, v, b, part, beta, inverse, erased, written, *size.shape, **size.solving)
        _walk[size.walking_rows](k, b, part, state, erased, written, states, last, *size.shape, **size.walking)
        _scores[size.scoring](q, k, b, part, scores, *size.shape[:3], **size.scored)
        _read[size.reading](q, written, b, part, scores, states, out, scale, *size.shape, **size.tiles)
        ctx.save_for_backward(q, k, v, decay, beta, sums, number, inverse, erased, written, scores, states)
        ctx.scale = scale
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> Any:  # type: ignore[override]
        q, k, v, decay, beta, sums, number, inverse, erased, written, scores, states = ctx.saved_tensors
        size = _Size(q, v, sums, number)
        b, part = (q if t is None else t for t in (sums, number))
        d_out, d_last = d_out.contiguous(), d_last.contiguous()
        d_q, d_k, d_v, d_written, d_right = (torch.empty_like(t) for t in (q, k, v, v, v))
        d_scores, d_overlap, d_first = (torch.empty_like(t) for t in (scores, inverse, d_last))
        d_states = v.new_empty(size.rows, size.chunks, size.keys, size.values)
        d_beta = beta.new_empty(size.parts + 1, *beta.shape, dtype=torch.float32)
        d_sums = None if sums is None else sums.new_empty(2, size.parts, *sums.shape)
        _walk_back[size.walking_rows](
            q, k, b, part, scores, erased, d_out, d_last, d_written, d_states, d_first, ctx.scale,
            *size.shape, **size.walking,
        )  # fmt: skip
        _d_within[(size.blocks,)](
            v, part, beta, inverse, written, d_out, d_written, d_v, d_right, d_scores, d_overlap, d_beta[-1], ctx.scale,
            size.chunks, size.heads, size.values, **size.within,
        )  # fmt: skip
        slopes = (q, q) if d_sums is None else d_sums
        _d_keys[size.keying](
            q, k, written, b, part, states, d_out, d_scores, d_states, d_q, d_k, slopes[0],
            ctx.scale, *size.shape, size.tokens, LEARNT=d_sums is not None, **size.keyed,
        )  # fmt: skip
        _d_erasing[(size.blocks * size.parts,)](
            k, b, part, beta, states, d_right, d_overlap, d_k, slopes[1], d_beta,
            *size.shape, size.tokens, **size.erasing,
        )  # fmt: skip
        d_decay = None if d_sums is None else summed(decay, d_sums.sum((0, 1)))
        return d_q, d_k, d_v, d_decay, d_beta.sum(0).to(beta.dtype), None, d_first, None


class _Size(Size):
    """Also of the walks, which hold all channels of the keys, and of the system."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor | None, number: Tensor | None) -> None:
        super().__init__(q, v, decay, number)
        wide = max(16, triton.next_power_of_2(self.keys))
        few = min(self.tiles["VALUES"], 64 * 128 // wide)
        while few > 16 and self.rows * triton.cdiv(self.values, few) < processors(v.device):
            few //= 2  # more programs where there are few rows to walk along
        self.walking_rows = (self.rows * triton.cdiv(self.values, few),)
        held = {"KEYS": wide, "VALUES": few, "num_warps": 4, "num_stages": 2 if wide < WIDEST_KEY else 1}
        self.walking = {**self.how, **held}
        # Never narrower: for Hopper triton 3.6 compiles products of 64 by 32 wrongly here, if the width is not aligned.
        self.solving = {**self.tiles, "HALVINGS": CHUNK.bit_length() - 1, "KEYS": 64, "VALUES": 64}
        self.erasing = {**self.tiles, "num_warps": 2}


def takes(drive: Drive) -> bool:
    """Whether :func:`delta_cuda` takes a drive: keys that are not too wide, and no decay per channel."""
    return drive.k.shape[-1] <= WIDEST_KEY and (drive.decay is None or drive.decay.dim() < 4)


def delta_cuda(drive: Drive, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`vestige.layers.ops.recurrence.recurrence`; by the delta rule, for what it :func:`takes`, and
    sums in float32."""
    return by_chunks(_Chunks.apply, drive, state, starts)
