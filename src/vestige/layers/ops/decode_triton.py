"""One token's attention over a cache of fixed slots, for CUDA.

A layer's entries lie flat: each (row, key-value head) has a segment of ``capacity`` slots from ``offset``
on, of which ``length`` are in use. The segments of a dense cache are equally long, those of a ragged one
are not; the kernels make no difference. A key-value head is read once for all query heads that share it, and
long segments are split over the chip.

A step is three launches: :func:`write_slot` puts the new entry into the slot of the one given up,
:func:`attend_slots` attends, adds the attention to the mass of each entry where the policy ranks by it, and
names the slot that the next token will take. Nothing returns to the host, so a step can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["SlotTable", "attend_slots", "turn_slots", "write_slot"]

APPEND, BY_MASS, BY_POSITION = 0, 1, 2  # how the next slot is found
EMPTY = -1


@dataclass
class SlotTable:
    """The slots of one layer.

    Attributes:
        keys, values: ``(slots, dim)`` flat over rows and key-value heads.
        positions: ``(slots,)`` int32, -1 where empty.
        mass: ``(slots,)`` float32, or ``None`` where entries are not ranked by attention.
        offset, length: ``(rows * kv_heads,)`` int32: where a segment begins, and the slots that may be read.
        target: ``(rows * kv_heads,)`` int32: the slot, within its segment, that the next token takes.
        rows, kv_heads, capacity: sizes; ``capacity`` is that of the longest segment.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor | None
    offset: Tensor
    length: Tensor
    target: Tensor
    rows: int
    kv_heads: int
    capacity: int

    def entries(self) -> list[Tensor]:
        """What is held for each slot."""
        held = [self.keys, self.values, self.positions]
        return held if self.mass is None else [*held, self.mass]


@triton.jit
def _write(
    key, value, keys, values, positions, mass, offset, length, target, seen,
    kv_heads, dim, key_stride_b, key_stride_h, value_stride_b, value_stride_h,
    MODE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row, head = segment // kv_heads, segment % kv_heads
    dims = tl.arange(0, DIM)
    slot = tl.load(offset + segment).to(tl.int64) + tl.load(target + segment)
    new_key = tl.load(key + row * key_stride_b + head * key_stride_h + dims, mask=dims < dim)
    new_value = tl.load(value + row * value_stride_b + head * value_stride_h + dims, mask=dims < dim)
    tl.store(keys + slot * dim + dims, new_key, mask=dims < dim)
    tl.store(values + slot * dim + dims, new_value, mask=dims < dim)
    tl.store(positions + slot, tl.load(seen + row) - 1)
    if MODE == 1:
        tl.store(mass + slot, 0.0)
    if MODE == 0:
        tl.store(length + segment, tl.load(target + segment) + 1)
        tl.store(target + segment, tl.load(target + segment) + 1)


@triton.jit
def _turn(came, cosine, sine, keys, offset, slots, kv_heads, dim, pairs, PAIRS: tl.constexpr):
    segment, number, each = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = segment // kv_heads
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    cos = tl.load(cosine + row * pairs + pair, mask=inside, other=0.0)
    sin = tl.load(sine + row * pairs + pair, mask=inside, other=0.0)
    line = came + (segment * each + number).to(tl.int64) * dim
    first = tl.load(line + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(line + pairs + pair, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(offset + segment).to(tl.int64) + tl.load(slots + row * each + number)
    at = keys + slot * dim
    tl.store(at + pair, (first * cos - second * sin).to(keys.dtype.element_ty), mask=inside)
    tl.store(at + pairs + pair, (second * cos + first * sin).to(keys.dtype.element_ty), mask=inside)


@triton.jit
def _partial(
    query, keys, values, positions, offset, length,
    out, highest_out, total_out, logits_out,
    kv_heads, group, dim, scaling, capacity, chunk, query_stride_b, query_stride_h,
    SCORES: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    segment, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = segment // kv_heads, segment % kv_heads
    members, dims, cols = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, COLS)
    q_at = query + row.to(tl.int64) * query_stride_b + (head * group + members[:, None]).to(tl.int64) * query_stride_h
    q = tl.load(q_at + dims[None, :], mask=(members < group)[:, None] & (dims < dim)[None, :], other=0.0)
    base = tl.load(offset + segment).to(tl.int64)
    end = tl.minimum(tl.load(length + segment), (split + 1) * chunk)
    highest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    gathered = tl.zeros([GROUP, DIM], tl.float32)
    for start in range(split * chunk, end, COLS):
        at = start + cols
        inside = at < end
        there = tl.load(positions + base + at, mask=inside, other=-1) >= 0
        tile = (base + at)[:, None] * dim + dims[None, :]
        k = tl.load(keys + tile, mask=inside[:, None] & (dims < dim)[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        logits = tl.where(there[None, :], logits, -1e30)
        if SCORES:
            where = (segment * group + members[:, None]).to(tl.int64) * capacity + at[None, :]
            tl.store(logits_out + where, logits, mask=(members < group)[:, None] & inside[None, :])
        new = tl.maximum(highest, tl.max(logits, 1))
        share = tl.where(there[None, :], tl.exp(logits - new[:, None]), 0.0)
        fade = tl.exp(highest - new)
        v = tl.load(values + tile, mask=inside[:, None] & (dims < dim)[None, :], other=0.0)
        gathered = gathered * fade[:, None] + tl.dot(share.to(v.dtype), v, input_precision=PRECISION)
        total = total * fade + tl.sum(share, 1)
        highest = new
    at = (segment * splits + split).to(tl.int64) * group + members
    tl.store(highest_out + at, highest, mask=members < group)
    tl.store(total_out + at, total, mask=members < group)
    tl.store(out + at[:, None] * dim + dims[None, :], gathered, mask=(members < group)[:, None] & (dims < dim)[None, :])


@triton.jit
def _combine(
    partial, highest_in, total_in, output, lse_out,
    group, dim, splits, out_stride_b, out_stride_h, kv_heads,
    SCORES: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    segment, member = tl.program_id(0), tl.program_id(1)
    row, head = segment // kv_heads, segment % kv_heads
    dims = tl.arange(0, DIM)
    each = tl.arange(0, SPLITS)
    at = (segment * splits + each).to(tl.int64) * group + member
    highest_each = tl.load(highest_in + at, mask=each < splits, other=-1e30)
    total_each = tl.load(total_in + at, mask=each < splits, other=0.0)
    highest = tl.max(highest_each, 0)
    weight = tl.exp(highest_each - highest)
    total = tl.sum(weight * total_each, 0)
    gathered = tl.zeros([DIM], tl.float32)
    for split in range(0, splits):
        place = (segment * splits + split).to(tl.int64) * group + member
        share = tl.exp(tl.load(highest_in + place) - highest)
        gathered += share * tl.load(partial + place * dim + dims, mask=dims < dim, other=0.0)
    where = row.to(tl.int64) * out_stride_b + (head * group + member).to(tl.int64) * out_stride_h
    tl.store(output + where + dims, (gathered / total).to(output.dtype.element_ty), mask=dims < dim)
    if SCORES:
        tl.store(lse_out + segment * group + member, highest + tl.log(total))


@triton.jit
def _rank(
    logits, lse, mass, positions, offset, length, target, seen,
    kv_heads, group, capacity, carry, sinks, recent,
    MODE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add this token's attention to the mass of each entry, and choose the slot for the next token."""
    segment = tl.program_id(0)
    base = tl.load(offset + segment).to(tl.int64)
    end = tl.load(length + segment)
    spared_from = tl.load(seen + segment // kv_heads) + 1 - recent
    cols = tl.arange(0, COLS)
    lowest = tl.full([COLS], float("inf"), tl.float32)
    chosen = tl.zeros([COLS], tl.int32)
    for start in range(0, end, COLS):
        at = start + cols
        inside = at < end
        position = tl.load(positions + base + at, mask=inside, other=0)
        if MODE == 1:
            received = tl.zeros([COLS], tl.float32)
            for member in range(0, group):
                norm = tl.load(lse + segment * group + member)
                line = (segment * group + member).to(tl.int64) * capacity
                received += tl.exp(tl.load(logits + line + at, mask=inside, other=-1e30) - norm)
            rank = tl.load(mass + base + at, mask=inside, other=0.0) * carry + received
            tl.store(mass + base + at, rank, mask=inside)
        else:
            rank = position.to(tl.float32)
        rank = tl.where((position < sinks) | (position >= spared_from), 3e38, rank)
        rank = tl.where(position < 0, -1.0, rank)
        rank = tl.where(inside, rank, float("inf"))
        better = rank < lowest
        lowest = tl.where(better, rank, lowest)
        chosen = tl.where(better, at, chosen)
    best = tl.min(lowest, 0)
    tl.store(target + segment, tl.min(tl.where(lowest == best, chosen, 2147483647), 0))


def write_slot(table: SlotTable, key: Tensor, value: Tensor, seen: Tensor, mode: int) -> None:
    """Write one new entry per segment into its target slot.

    Args:
        key, value: ``(rows, kv_heads, 1, dim)``.
        seen: ``(rows,)`` int32 tokens seen, the new one included.
        mode: ``APPEND``, ``BY_MASS`` or ``BY_POSITION``.
    """
    dim = key.shape[-1]
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    mass = table.mass if table.mass is not None else table.positions
    _write[(table.rows * table.kv_heads,)](
        key, value, table.keys, table.values, table.positions, mass, table.offset, table.length, table.target, seen,
        table.kv_heads, dim, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        MODE=mode, DIM=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip


def turn_slots(table: SlotTable, came: Tensor, slots: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """Write some keys anew, turned by a row's phase.

    Args:
        came: ``(rows, kv_heads, turned, dim)`` the keys before the turn.
        slots: ``(rows, turned)`` where in its segment each is held.
        cosine, sine: ``(rows, pairs)`` float32 of the angle of each pair of dimensions.
    """
    pairs = cosine.shape[1]
    _turn[(table.rows * table.kv_heads, came.shape[2])](
        came, cosine, sine, table.keys, table.offset, slots, table.kv_heads, came.shape[3], pairs,
        PAIRS=triton.next_power_of_2(pairs), num_warps=1,
    )  # fmt: skip


def attend_slots(
    table: SlotTable,
    query: Tensor,
    seen: Tensor,
    *,
    scaling: float,
    mode: int,
    carry: float = 1.0,
    sinks: int = 0,
    recent: int = 0,
) -> Tensor:
    """Attend from one token per row to its segments; rank the entries and name the next slot as ``mode`` says.

    Args:
        query: ``(rows, heads, 1, dim)``.
        seen: ``(rows,)`` int32 tokens seen, the new one included.
        carry: factor on the mass gathered before this token.
        sinks, recent: entries that are never given up: the first tokens, and the last, the next one included.

    Returns:
        ``(rows, 1, heads, dim)``.
    """
    rows, heads, _, dim = query.shape
    group = heads // table.kv_heads
    segments = rows * table.kv_heads
    query = query if query.stride(-1) == 1 else query.contiguous()
    cols = 64 if query.element_size() == 4 else 128
    splits, chunk = _splits(table.capacity, segments, cols, query.device)
    new = {"device": query.device, "dtype": torch.float32}
    scores = mode == BY_MASS
    partial = torch.empty(segments * splits * group * dim, **new)
    highest = torch.empty(segments * splits * group, **new)
    total = torch.empty(segments * splits * group, **new)
    logits = torch.empty(segments * group * table.capacity if scores else 1, **new)
    lse = torch.empty(segments * group, **new)
    output = query.new_empty(rows, 1, heads, dim)
    wide = triton.next_power_of_2(dim)
    _partial[(segments, splits)](
        query, table.keys, table.values, table.positions, table.offset, table.length, partial, highest, total, logits,
        table.kv_heads, group, dim, scaling, table.capacity, chunk, query.stride(0), query.stride(1),
        SCORES=scores, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        GROUP=max(16, triton.next_power_of_2(group)), COLS=cols, DIM=wide, num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(segments, group)](
        partial, highest, total, output, lse, group, dim, splits, output.stride(0), output.stride(2), table.kv_heads,
        SCORES=scores, SPLITS=triton.next_power_of_2(splits), DIM=wide, num_warps=1,
    )  # fmt: skip
    if mode != APPEND:
        mass = table.mass if table.mass is not None else table.positions
        _rank[(segments,)](
            logits, lse, mass, table.positions, table.offset, table.length, table.target, seen,
            table.kv_heads, group, table.capacity, carry, sinks, recent,
            MODE=mode, COLS=min(1024, triton.next_power_of_2(table.capacity)), num_warps=4,
        )  # fmt: skip
    return output


def _splits(capacity: int, segments: int, cols: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a segment is split, and the slots of each: about four programs per multiprocessor."""
    chips = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = max(1, min(triton.cdiv(capacity, cols), triton.cdiv(4 * chips, segments), 64))
    chunk = triton.cdiv(triton.cdiv(capacity, wanted), cols) * cols
    return triton.cdiv(capacity, chunk), chunk
