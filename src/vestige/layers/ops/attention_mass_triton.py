"""Triton form of :func:`vestige.layers.ops.attention_mass.attention_mass`, for CUDA.

Two passes over tiles, as flash attention makes them: the first finds the log-sum-exp of every query's
logits, the second adds each query's weighted share to the keys of its tile. Nothing of size
``queries x keys`` is written; beside its result it holds one float per query and head.

Few queries, as those at the end of a long prompt, leave the first pass hardly a tile to share out; their logits are
small enough to be written down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attention_mass_cuda"]

FEW = 64  # rows of a group's queries, up to which logits are written down


@triton.jit
def _tile(start, rows, count, stride, dims, dim):
    """Rows of a matrix, zero beyond its edges."""
    inside = (rows < count)[:, None] & (dims < dim)[None, :]
    return tl.load(start + rows[:, None].to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _log_sum_exp(
    query, keys, valid, lse,
    count, entries, heads, group, dim, scaling,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv = head // group
    rows, cols, dims = first + tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DIM)
    q_at = query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    q = _tile(q_at, rows, count, q_row, dims, dim)
    k_at = keys + batch.to(tl.int64) * k_batch + kv.to(tl.int64) * k_head
    v_at = valid + (batch * (heads // group) + kv).to(tl.int64) * entries
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    held = entries - count
    end = tl.minimum(held + first + ROWS, entries)
    for start in range(0, end, COLS):
        at = start + cols
        k = _tile(k_at, at, entries, k_row, dims, dim)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        seen = (at[None, :] <= held + rows[:, None]) & (at < entries)[None, :]
        if HAS_VALID:
            seen &= (tl.load(v_at + at, mask=at < entries, other=0) != 0)[None, :]
        logits = tl.where(seen, logits, -1e30)
        new = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp(highest - new) + tl.sum(tl.where(seen, tl.exp(logits - new[:, None]), 0.0), 1)
        highest = new
    # A query that sees nothing (padding) gets an infinite sum, and so adds nothing anywhere.
    out = tl.where(total > 0, highest + tl.log(total), float("inf"))
    tl.store(lse + tl.program_id(1).to(tl.int64) * count + rows, out, mask=rows < count)


@triton.jit
def _column_sums(
    query, keys, valid, lse, weights, mass,
    count, entries, heads, group, dim, scaling,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * COLS
    kv_heads = heads // group
    batch, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    at, dims = start + tl.arange(0, COLS), tl.arange(0, DIM)
    k_at = keys + batch.to(tl.int64) * k_batch + kv.to(tl.int64) * k_head
    k = _tile(k_at, at, entries, k_row, dims, dim)
    there = at < entries
    if HAS_VALID:
        there &= tl.load(valid + tl.program_id(1).to(tl.int64) * entries + at, mask=at < entries, other=0) != 0
    held = entries - count
    begin = (tl.maximum(start - held, 0) // ROWS) * ROWS
    total = tl.zeros([COLS], tl.float32)
    for member in range(0, group):
        head = kv * group + member
        q_at = query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        l_at = lse + (batch * heads + head).to(tl.int64) * count
        for first in range(begin, count, ROWS):
            rows = first + tl.arange(0, ROWS)
            q = _tile(q_at, rows, count, q_row, dims, dim)
            norm = tl.load(l_at + rows, mask=rows < count, other=float("inf"))
            weight = tl.load(weights + batch.to(tl.int64) * count + rows, mask=rows < count, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling
            seen = (at[:, None] <= held + rows[None, :]) & there[:, None]
            share = tl.where(seen, tl.exp(logits - norm[None, :]), 0.0)
            total += tl.sum(share * weight[None, :], 1)
    tl.store(mass + tl.program_id(1).to(tl.int64) * entries + at, total, mask=at < entries)


@triton.jit
def _logits(
    query, keys, out,
    count, entries, kv_heads, group, dim, scaling,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    at, rows, dims = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, ROWS), tl.arange(0, DIM)
    segment = tl.program_id(1)
    batch, kv = segment // kv_heads, segment % kv_heads
    member, number = rows // count, rows % count
    there = rows < group * count
    q = tl.load(
        query + batch.to(tl.int64) * q_batch + (kv * group + member)[:, None].to(tl.int64) * q_head
        + number[:, None].to(tl.int64) * q_row + dims[None, :],
        mask=there[:, None] & (dims < dim)[None, :],
        other=0.0,
    )  # fmt: skip
    k_at = keys + batch.to(tl.int64) * k_batch + kv.to(tl.int64) * k_head
    k = _tile(k_at, at, entries, k_row, dims, dim)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    logits = tl.where(at[None, :] <= entries - count + number[:, None], logits, float("-inf"))
    row = (segment * group * count + rows).to(tl.int64)
    tl.store(out + row[:, None] * entries + at[None, :], logits, mask=there[:, None] & (at < entries)[None, :])


def attention_mass_cuda(
    query: Tensor, keys: Tensor, weights: Tensor, *, scaling: float, valid: Tensor | None = None
) -> Tensor:
    """See :func:`vestige.layers.ops.attention_mass.attention_mass`; float32 result, no soft cap and no window."""
    batch, heads, count, dim = query.shape
    kv_heads, entries = keys.shape[1], keys.shape[2]
    query, keys = _rows_contiguous(query), _rows_contiguous(keys)
    if heads // kv_heads * count <= FEW:
        return _mass_of_few(query, keys, weights, scaling, valid)
    weights = weights.float().expand(batch, count).contiguous()
    seen = valid.contiguous().view(torch.uint8) if valid is not None else query
    lse = torch.empty(batch, heads, count, device=query.device, dtype=torch.float32)
    mass = torch.empty(batch, kv_heads, entries, device=query.device, dtype=torch.float32)
    exact = query.dtype == torch.float32
    side = 64 if exact else 128
    shape = (count, entries, heads, heads // kv_heads, dim, scaling, *query.stride()[:3], *keys.stride()[:3])
    how = {
        "HAS_VALID": valid is not None,
        "PRECISION": "ieee" if exact else "tf32",
        "ROWS": side,
        "COLS": side,
        "DIM": max(16, triton.next_power_of_2(dim)),
        "num_warps": 8,
        "num_stages": 2,
    }
    _log_sum_exp[(triton.cdiv(count, side), batch * heads)](query, keys, seen, lse, *shape, **how)
    _column_sums[(triton.cdiv(entries, side), batch * kv_heads)](query, keys, seen, lse, weights, mass, *shape, **how)
    return mass


def _mass_of_few(query: Tensor, keys: Tensor, weights: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    batch, heads, count, dim = query.shape
    kv_heads, entries = keys.shape[1], keys.shape[2]
    group, columns = heads // kv_heads, 64 if query.dtype == torch.float32 else 128
    logits = torch.empty(batch, kv_heads, group * count, entries, device=query.device, dtype=torch.float32)
    _logits[(triton.cdiv(entries, columns), batch * kv_heads)](
        query, keys, logits, count, entries, kv_heads, group, dim, scaling, *query.stride()[:3], *keys.stride()[:3],
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        ROWS=max(16, triton.next_power_of_2(group * count)), COLS=columns, DIM=max(16, triton.next_power_of_2(dim)),
    )  # fmt: skip
    if valid is not None:
        logits.masked_fill_(~valid[:, :, None], float("-inf"))
    share = torch.softmax(logits, dim=-1)
    if valid is not None:
        share.nan_to_num_()  # a row of padding may see nothing at all
    rows = weights.float().expand(batch, count).repeat(1, group)
    return (rows[:, None, None] @ share).squeeze(2)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
