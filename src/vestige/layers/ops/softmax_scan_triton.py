r"""Triton form of :func:`vestige.layers.ops.softmax_scan.softmax_scan`, for CUDA, with its backward pass.

One program walks along a sequence, for one head and some of the values' channels, a chunk at a time, and carries the
pool of what came before. Backward, with :math:`L_t` the logarithm of the sum of weights that token t saw,

.. math::
    G_j = \sum_{t \ge j} e^{s_j - L_t}\, do_t, \qquad dv_j = G_j, \qquad
    ds_j = v_j \cdot G_j - \sum_{t \ge j} e^{s_j - L_t}\, do_t \cdot o_t ,

two sums over what comes later: the same walk, from the end. Every exponent is at most zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.softmax_scan import LEAST, Pool

__all__ = ["softmax_scan_cuda"]

CHUNK = 64
NONE = tl.constexpr(LEAST)
REAL = tl.constexpr(LEAST / 2)  # whatever is above counts


@triton.jit
def _means(
    scores, values, sequence, peak_in, weight_in, total_in, out, reach, peak_out, weight_out, total_out,
    length, heads, dim,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    dims = tl.program_id(1) * DIM + tl.arange(0, DIM)
    here = tl.arange(0, CHUNK)
    peak, weight = tl.load(peak_in + row), tl.load(weight_in + row)
    total = tl.load(total_in + row * dim + dims, mask=dims < dim, other=0.0)
    held = 0  # the packed sequence that the pool is of
    for first in range(0, length, CHUNK):
        at = first + here
        start = ((batch * length + first) * heads + head) * dim
        place = here[:, None] * (heads * dim) + dims[None, :]
        inside = (at < length)[:, None] & (dims < dim)[None, :]
        s = tl.load(scores + row * length + at, mask=at < length, other=NONE)
        v = tl.load(values + start + place, mask=inside, other=0.0).to(tl.float32)
        seen = (here[None, :] <= here[:, None]) & (s > REAL)[None, :]
        last = s > REAL  # what the last token of the chunk sees
        before = tl.full([CHUNK], 1, tl.int1)
        goes_on = True
        if PACKED:
            number = tl.load(sequence + batch * length + at, mask=at < length, other=-1)
            seen = seen & (number[None, :] == number[:, None])
            before = number == held
            now = tl.load(sequence + batch * length + tl.minimum(first + CHUNK, length) - 1)
            last = last & (number == now)
            goes_on = now == held
            held = now
        old = tl.where(before, peak, NONE)
        highest = tl.maximum(tl.max(tl.where(seen, s[None, :], NONE), 1), old)
        share = tl.where(seen, tl.exp(s[None, :] - highest[:, None]), 0.0)
        mine = tl.where(before, tl.exp(old - highest), 0.0)
        mass = tl.sum(share, 1) + mine * weight
        mean = tl.dot(share, v, input_precision=PRECISION) + mine[:, None] * total[None, :]
        mean = mean / tl.where(mass > 0, mass, 1.0)[:, None]
        tl.store(out + start + place, mean.to(out.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            seen_sum = tl.where(mass > 0, highest + tl.log(tl.where(mass > 0, mass, 1.0)), NONE)
            tl.store(reach + row * length + at, seen_sum, mask=at < length)
        kept = tl.where(goes_on, peak, NONE)
        top = tl.maximum(tl.max(tl.where(last, s, NONE), 0), kept)
        add = tl.where(last, tl.exp(s - top), 0.0)
        keep = tl.where(goes_on, tl.exp(kept - top), 0.0)
        peak, weight = top, weight * keep + tl.sum(add, 0)
        total = total * keep + tl.sum(add[:, None] * v, 0)
    tl.store(total_out + row * dim + dims, total, mask=dims < dim)
    if tl.program_id(1) == 0:
        tl.store(peak_out + row, peak)
        tl.store(weight_out + row, weight)


@triton.jit
def _slopes(
    scores, values, sequence, peak_in, out, reach, peak_out, d_out, d_weight, d_total,
    d_scores, d_values, d_weight_in, d_total_in,
    length, heads, dim, rows,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, head = row // heads, row % heads
    dims = part * DIM + tl.arange(0, DIM)
    here = tl.arange(0, CHUNK)
    # What comes later: weights are relative to the first of it, and begin with what happens to the pool at the end.
    base = tl.load(peak_out + row)
    later = tl.load(d_total + row * dim + dims, mask=dims < dim, other=0.0)
    less = tl.where(part == 0, -tl.load(d_weight + row), 0.0)
    held = 0
    if PACKED:
        held = tl.load(sequence + batch * length + length - 1)
    for back in range(0, tl.cdiv(length, CHUNK)):
        first = (tl.cdiv(length, CHUNK) - 1 - back) * CHUNK
        at = first + here
        start = ((batch * length + first) * heads + head) * dim
        place = here[:, None] * (heads * dim) + dims[None, :]
        inside = (at < length)[:, None] & (dims < dim)[None, :]
        s = tl.load(scores + row * length + at, mask=at < length, other=NONE)
        sums = tl.load(reach + row * length + at, mask=at < length, other=NONE)
        v = tl.load(values + start + place, mask=inside, other=0.0).to(tl.float32)
        do = tl.load(d_out + start + place, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(out + start + place, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(do * o, 1)
        seen = (here[:, None] <= here[None, :]) & (s > REAL)[:, None] & (sums > REAL)[None, :]
        after = s > REAL
        front = sums > REAL  # what the first token of the chunk is seen by
        goes_on = True
        if PACKED:
            number = tl.load(sequence + batch * length + at, mask=at < length, other=-1)
            seen = seen & (number[:, None] == number[None, :])
            after = after & (number == held)
            now = tl.load(sequence + batch * length + first)
            front = front & (number == now)
            goes_on = now == held
            held = now
        share = tl.where(seen, tl.exp(tl.where(seen, s[:, None] - sums[None, :], 0.0)), 0.0)
        theirs = tl.where(after, tl.exp(tl.minimum(s - base, 0.0)), 0.0)
        dv = tl.dot(share, do, input_precision=PRECISION) + theirs[:, None] * later[None, :]
        ds = tl.sum(v * dv, 1) - tl.sum(share * along[None, :], 1) - theirs * less
        tl.store(d_values + start + place, dv.to(d_values.dtype.element_ty), mask=inside)
        tl.store(d_scores + (part * rows + row) * length + at, ds, mask=at < length)
        fresh = tl.load(reach + row * length + first)
        add = tl.where(front, tl.exp(tl.where(front, fresh - sums, 0.0)), 0.0)
        keep = tl.where(goes_on, tl.exp(tl.where(goes_on, fresh - base, 0.0)), 0.0)
        later = later * keep + tl.sum(add[:, None] * do, 0)
        less = less * keep + tl.sum(add * along, 0)
        base = fresh
    keep = tl.where(held == 0, tl.exp(tl.where(held == 0, tl.load(peak_in + row) - base, 0.0)), 0.0)
    tl.store(d_total_in + row * dim + dims, later * keep, mask=dims < dim)
    tl.store(d_weight_in + part * rows + row, -less * keep)


class _Scan(torch.autograd.Function):
    """Scores are ``(batch, heads, length)`` in float32, with ``LEAST`` where a token does not count."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, values: Tensor, peak: Tensor, weight: Tensor, total: Tensor, sequence: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, length, heads, dim = values.shape
        out, reach = torch.empty_like(values), torch.empty_like(scores)
        after = [torch.empty_like(t) for t in (peak, weight, total)]
        how, parts = _tiles(values, sequence)
        number = scores if sequence is None else sequence
        _means[(batch * heads, parts)](
            scores, values, number, peak, weight, total, out, reach, *after, length, heads, dim, **how
        )
        ctx.save_for_backward(scores, values, sequence, peak, out, reach, after[0])
        ctx.mark_non_differentiable(after[0])
        return out, after[0], after[1], after[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Any, d_weight: Tensor, d_total: Tensor) -> Any:  # type: ignore[override]
        scores, values, sequence, peak, out, reach, last = ctx.saved_tensors
        batch, length, heads, dim = values.shape
        how, parts = _tiles(values, sequence)
        d_scores = scores.new_empty(parts, *scores.shape)
        d_values = torch.empty_like(values)
        d_before = (
            scores.new_empty(parts, batch, heads),
            torch.empty_like(d_total, memory_format=torch.contiguous_format),
        )
        number = scores if sequence is None else sequence
        _slopes[(batch * heads, parts)](
            scores, values, number, peak, out, reach, last,
            d_out.contiguous(), d_weight.contiguous(), d_total.contiguous(), d_scores, d_values, *d_before,
            length, heads, dim, batch * heads, **how,
        )  # fmt: skip
        return d_scores.sum(0), d_values, None, d_before[0].sum(0), d_before[1], None


def _tiles(values: Tensor, sequence: Tensor | None) -> tuple[dict[str, Any], int]:
    """Settings of a kernel, and over how many programs the channels of a head are spread."""
    dim = values.shape[-1]
    wide = max(16, min(32, triton.next_power_of_2(dim)))
    exact = values.dtype == torch.float32
    how = {"PACKED": sequence is not None, "PRECISION": "ieee" if exact else "tf32", "CHUNK": CHUNK, "DIM": wide}
    return {**how, "num_warps": 8 if exact else 4}, triton.cdiv(dim, wide)


@torch.compiler.disable
def softmax_scan_cuda(
    scores: Tensor, values: Tensor, before: Pool | None, valid: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Pool]:
    """See :func:`vestige.layers.ops.softmax_scan.softmax_scan`; sums are in float32."""
    scores = scores.float()
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None], LEAST)
    scores = scores.transpose(1, 2).contiguous()
    pool = Pool.empty(values[:, 0].float()) if before is None else before
    sequence = None if starts is None else starts.cumsum(1, dtype=torch.int32)
    with torch.cuda.device_of(values):
        out, *after = _Scan.apply(scores, values.contiguous(), *(t.float().contiguous() for t in pool), sequence)
    return out, Pool(*after)
