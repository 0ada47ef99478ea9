r"""Triton form of :func:`vestige.layers.ops.local_linear.local_linear_attention`, for CUDA, with its backward pass.

A program has some queries and passes over their keys as flash attention does: once for the log-sum-exp and the mean
key, once for each step of the solver, which goes on until all of its queries are done, and once for the answer. Shares
:math:`p_j` are worked out anew in each pass; nothing of the size of length by length is held.

Backward, with :math:`t_j = (k_j - \bar k) \cdot z`, :math:`a_j = do \cdot v_j` and :math:`\bar a = \sum_j p_j a_j`, a
second solve gives the adjoint :math:`y` and the slopes :math:`g_j` in the shares,

.. math::
    (C + \lambda I)\, y = -\sum_j p_j a_j (k_j - \bar k), \qquad s_j = (k_j - \bar k) \cdot y, \qquad
    g_j = (1 - t_j)\, a_j - s_j t_j + k_j \cdot (\bar a z + y),

    dv_j = p_j (1 - t_j)\, do, \qquad
    dk_j = p_j \big((1 - t_j)\, y + (\bar a - a_j - s_j)\, z\big) + \dots, \qquad dq = -y + \dots,

where dots stand for what runs through the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.tiles_triton import _matrix, _put_matrix

__all__ = ["local_linear_cuda", "serves"]

PRECISION = tl.constexpr("tf32")
WIDEST = 128
ENOUGH = tl.constexpr(1e-4)
"""Size of what the solver leaves of its right-hand side, relative to it: less than half precision tells apart."""
FEWEST = 16
"""Queries of a call below which the programs would be too few, and most of their rows empty."""


@triton.jit
def _by_key(x, kt):
    """Products of rows with keys, in half precision where the rows are."""
    return tl.dot(x, tl.trans(kt.to(x.dtype)), input_precision=PRECISION)


@triton.jit
def _weighted(share, rows):
    """Sums of rows; the shares keep more digits than half precision has."""
    return tl.dot(share, rows.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _seen(rows, cols, valid, sequence, held, VALID: tl.constexpr, PACKED: tl.constexpr):
    """Which keys a query sees, both by their place among the keys: always its own."""
    seen = cols[None, :] <= rows[:, None]
    if VALID:
        seen = seen & (tl.load(valid + cols, mask=cols < held, other=0) != 0)[None, :]
    if PACKED:
        mine = tl.load(sequence + rows, mask=rows < held, other=-1)
        seen = seen & (mine[:, None] == tl.load(sequence + cols, mask=cols < held, other=-2)[None, :])
    return (seen | (cols[None, :] == rows[:, None])) & (cols < held)[None, :]


@triton.jit
def _shares(q, kt, sums, scaling, seen):
    """Of the keys of a tile, by the logarithm of each query's sum."""
    return tl.where(seen, tl.exp(tl.minimum(_by_key(q, kt) * scaling - sums[:, None], 0.0)), 0.0)


@triton.jit
def _solution(
    due, q, mean, sums, key, valid, sequence, kv, rows, end, held, dims, dim, scaling, ridge, iterations,
    VALID: tl.constexpr, PACKED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients for every row; rows that are done stand still."""
    z, rest, direction = due * 0.0, due, due
    size = tl.sum(due * due, 1)
    enough = size * (ENOUGH * ENOUGH)
    left = iterations
    while left > 0:
        working = size > enough
        ahead, weights = due * 0.0, size * 0.0
        level = tl.sum(direction * mean, 1)
        for start in range(0, end, COLS):
            cols = start + tl.arange(0, COLS)
            kt = _matrix(key, kv, cols, dims, held, dim)
            share = _shares(q, kt, sums, scaling, _seen(rows, cols, valid, sequence, held, VALID, PACKED))
            share = share * (_by_key(direction, kt) - level[:, None])
            ahead += _weighted(share, kt)
            weights += tl.sum(share, 1)
        ahead += ridge * direction - weights[:, None] * mean
        along = tl.sum(direction * ahead, 1)
        step = tl.where(working, size / tl.where(along > 0, along, 1.0), 0.0)
        z += step[:, None] * direction
        rest -= step[:, None] * ahead
        now = tl.sum(rest * rest, 1)
        ratio = tl.where(working, now / tl.where(size > 0, size, 1.0), 0.0)
        direction = tl.where(working[:, None], rest + ratio[:, None] * direction, direction)
        size = tl.where(working, now, size)
        busy = tl.sum((size > enough).to(tl.int32), 0)
        left = tl.where(busy > 0, left - 1, 0)
    return z


@triton.jit(do_not_specialize=["iterations"])
def _answers(
    query, key, value, valid, sequence, out, reach, mean_key, slope,
    length, held, heads, group, dim, width, scaling, ridge, iterations,
    VALID: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch, kv = head // heads, head // group
    mine = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    rows = held - length + mine
    end = tl.minimum(held - length + (tl.program_id(0) + 1) * ROWS, held)
    valid += batch * held
    sequence += batch * held
    q = _matrix(query, head, mine, dims, length, dim)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total, mean = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        kt = _matrix(key, kv, cols, dims, held, dim)
        seen = _seen(rows, cols, valid, sequence, held, VALID, PACKED)
        logits = tl.where(seen, _by_key(q, kt) * scaling, -1e30)
        new = tl.maximum(highest, tl.max(logits, 1))
        share = tl.where(seen, tl.exp(logits - new[:, None]), 0.0)
        old = tl.exp(highest - new)
        total = total * old + tl.sum(share, 1)
        mean = mean * old[:, None] + _weighted(share, kt)
        highest = new
    total = tl.where(total > 0, total, 1.0)
    mean = mean / total[:, None]
    sums = highest + tl.log(total)
    due = tl.where((mine < length)[:, None], mean - q, 0.0)
    z = _solution(
        due, q, mean, sums, key, valid, sequence, kv, rows, end, held, dims, dim, scaling, ridge, iterations,
        VALID, PACKED, COLS,
    )  # fmt: skip
    level = tl.sum(z * mean, 1)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        kt = _matrix(key, kv, cols, dims, held, dim)
        share = _shares(q, kt, sums, scaling, _seen(rows, cols, valid, sequence, held, VALID, PACKED))
        share = share * (1.0 - _by_key(z, kt) + level[:, None])
        found += _weighted(share, _matrix(value, kv, cols, wide, held, width))
    _put_matrix(out, head, mine, wide, length, width, found)
    _put_matrix(mean_key, head, mine, dims, length, dim, mean)
    _put_matrix(slope, head, mine, dims, length, dim, z)
    tl.store(reach + head * length + mine, sums, mask=mine < length)


@triton.jit(do_not_specialize=["iterations"])
def _of_queries(
    query, key, value, valid, sequence, reach, mean_key, slope, d_out, d_query, adjoint, numbers,
    length, held, heads, group, dim, width, scaling, ridge, iterations, queries,
    VALID: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The slopes in queries; beside them the adjoint, and four numbers of each query that its keys need."""
    head = tl.program_id(1).to(tl.int64)
    batch, kv = head // heads, head // group
    mine = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    rows = held - length + mine
    end = tl.minimum(held - length + (tl.program_id(0) + 1) * ROWS, held)
    valid += batch * held
    sequence += batch * held
    q = _matrix(query, head, mine, dims, length, dim)
    mean = _matrix(mean_key, head, mine, dims, length, dim)
    do = _matrix(d_out, head, mine, wide, length, width)
    sums = tl.load(reach + head * length + mine, mask=mine < length, other=float("inf"))
    gained, due = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        kt = _matrix(key, kv, cols, dims, held, dim)
        share = _shares(q, kt, sums, scaling, _seen(rows, cols, valid, sequence, held, VALID, PACKED))
        share = share * _by_key(do, _matrix(value, kv, cols, wide, held, width))
        gained += tl.sum(share, 1)
        due -= _weighted(share, kt)
    due += gained[:, None] * mean
    y = _solution(
        due, q, mean, sums, key, valid, sequence, kv, rows, end, held, dims, dim, scaling, ridge, iterations,
        VALID, PACKED, COLS,
    )  # fmt: skip
    z = _matrix(slope, head, mine, dims, length, dim)
    level, other = tl.sum(z * mean, 1), tl.sum(y * mean, 1)
    common, dq = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        kt = _matrix(key, kv, cols, dims, held, dim)
        share = _shares(q, kt, sums, scaling, _seen(rows, cols, valid, sequence, held, VALID, PACKED))
        along, across = _by_key(z, kt), _by_key(y, kt)
        gain = _by_key(do, _matrix(value, kv, cols, wide, held, width))
        t = along - level[:, None]
        share = share * ((1.0 - t) * gain - (across - other[:, None]) * t + gained[:, None] * along + across)
        common += tl.sum(share, 1)
        dq += _weighted(share, kt)
    _put_matrix(d_query, head, mine, dims, length, dim, scaling * (dq - common[:, None] * mean) - y)
    _put_matrix(adjoint, head, mine, dims, length, dim, y)
    place = numbers + head * length + mine
    tl.store(place, level, mask=mine < length)
    tl.store(place + queries, other, mask=mine < length)
    tl.store(place + 2 * queries, gained, mask=mine < length)
    tl.store(place + 3 * queries, common, mask=mine < length)


@triton.jit
def _of_keys(
    query, key, value, valid, sequence, reach, slope, adjoint, numbers, d_out, d_key, d_value,
    length, held, heads, group, dim, width, scaling, queries,
    VALID: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The slopes in keys and values, of the queries of all heads that share them."""
    kv = tl.program_id(1).to(tl.int64)
    batch = kv * group // heads
    start = tl.program_id(0) * COLS
    cols = start + tl.arange(0, COLS)
    dims, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    valid += batch * held
    sequence += batch * held
    kt = _matrix(key, kv, cols, dims, held, dim)
    vt = _matrix(value, kv, cols, wide, held, width)
    dk, dv = tl.zeros([COLS, DIM], tl.float32), tl.zeros([COLS, WIDTH], tl.float32)
    begin = tl.maximum(start - (held - length), 0) // ROWS * ROWS
    for member in range(0, group):
        head = kv * group + member
        for first in range(begin, length, ROWS):
            mine = first + tl.arange(0, ROWS)
            rows = held - length + mine
            place = numbers + head * length + mine
            sums = tl.load(reach + head * length + mine, mask=mine < length, other=float("inf"))
            level = tl.load(place, mask=mine < length, other=0.0)[:, None]
            other = tl.load(place + queries, mask=mine < length, other=0.0)[:, None]
            gained = tl.load(place + 2 * queries, mask=mine < length, other=0.0)[:, None]
            common = tl.load(place + 3 * queries, mask=mine < length, other=0.0)[:, None]
            q = _matrix(query, head, mine, dims, length, dim)
            z = _matrix(slope, head, mine, dims, length, dim)
            y = _matrix(adjoint, head, mine, dims, length, dim).to(kt.dtype)
            do = _matrix(d_out, head, mine, wide, length, width)
            share = _shares(q, kt, sums, scaling, _seen(rows, cols, valid, sequence, held, VALID, PACKED))
            along, across, gain = _by_key(z, kt), _by_key(y, kt), _by_key(do, vt)
            t, s = along - level, across - other
            slopes = share * ((1.0 - t) * gain - s * t + gained * along + across - common)
            rest = tl.trans((share * (1.0 - t)).to(kt.dtype))
            bent = tl.trans((share * (gained - gain - s)).to(kt.dtype))
            dv += tl.dot(rest, do, input_precision=PRECISION)
            dk += tl.dot(rest, y, input_precision=PRECISION)
            dk += tl.dot(bent, z.to(kt.dtype), input_precision=PRECISION)
            dk += tl.dot(tl.trans((scaling * slopes).to(kt.dtype)), q, input_precision=PRECISION)
    _put_matrix(d_key, kv, cols, dims, held, dim, dk)
    _put_matrix(d_value, kv, cols, wide, held, width, dv)


class _Estimate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        sequence: Tensor | None,
        scaling: float,
        ridge: float,
        iterations: int,
    ) -> Tensor:
        batch, heads, length = query.shape[:3]
        out = query.new_empty(batch, heads, length, value.shape[-1])
        mean, slope = (torch.empty(query.shape, device=query.device) for _ in range(2))
        reach = torch.empty(batch, heads, length, device=query.device)
        numbers, how = _call(query, key, value, valid, sequence)
        _answers[(triton.cdiv(length, how["ROWS"]), batch * heads)](
            query, key, value, query if valid is None else valid, query if sequence is None else sequence,
            out, reach, mean, slope, *numbers, scaling, ridge, iterations, **how,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, valid, sequence, reach, mean, slope)
        ctx.numbers = scaling, ridge, iterations
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        query, key, value, valid, sequence, reach, mean, slope = ctx.saved_tensors
        scaling, ridge, iterations = ctx.numbers
        batch, heads, length, _ = query.shape
        d_query, d_key, d_value = (torch.empty_like(t) for t in (query, key, value))
        adjoint, of_query = torch.empty_like(slope), reach.new_empty(4, *reach.shape)
        d_out = d_out.contiguous()
        numbers, how = _call(query, key, value, valid, sequence)
        fewer = how | {"ROWS": 16, "num_warps": 4}  # where many tiles are held at once
        place = (query if valid is None else valid, query if sequence is None else sequence)
        _of_queries[(triton.cdiv(length, how["ROWS"]), batch * heads)](
            query, key, value, *place, reach, mean, slope, d_out, d_query, adjoint, of_query,
            *numbers, scaling, ridge, iterations, reach.numel(), **how,
        )  # fmt: skip
        _of_keys[(triton.cdiv(key.shape[2], how["COLS"]), batch * key.shape[1])](
            query, key, value, *place, reach, slope, adjoint, of_query, d_out, d_key, d_value,
            *numbers, scaling, reach.numel(), **fewer,
        )  # fmt: skip
        return d_query, d_key, d_value, None, None, None, None, None


def _call(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, sequence: Tensor | None
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The sizes that kernels take, and their settings."""
    heads, length, dim = query.shape[1:]
    width = value.shape[-1]
    how = {
        "VALID": valid is not None,
        "PACKED": sequence is not None,
        "ROWS": 32,
        "COLS": 32,
        "DIM": max(16, triton.next_power_of_2(dim)),
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "num_warps": 8 if max(dim, width) > 64 else 4,
        "num_stages": 2,
    }
    return (length, key.shape[2], heads, heads // key.shape[1], dim, width), how


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether the kernels are the better way: for half precision, many queries, and heads that fit into a program."""
    few = query.shape[2] < FEWEST
    return query.dtype == torch.bfloat16 and not few and max(query.shape[-1], value.shape[-1]) <= WIDEST


@torch.compiler.disable
def local_linear_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    ridge: float,
    iterations: int,
    valid: Tensor | None,
    sequence: Tensor | None,
) -> Tensor:
    """See :func:`vestige.layers.ops.local_linear.local_linear_attention`; heads at most ``WIDEST`` wide."""
    q, k, v = (t.to(query.dtype).contiguous() for t in (query, key, value))
    seen = None if valid is None else valid.contiguous().view(torch.uint8)
    number = None if sequence is None else sequence.int().contiguous()
    with torch.cuda.device_of(query):
        return _Estimate.apply(q, k, v, seen, number, scaling, ridge, iterations)  # type: ignore[no-any-return]
