"""A layer whose heads hold unequal numbers of entries: a budget per head is storage per head.

The entries of all rows and key-value heads lie flat, one segment after the other::

    keys, values   (slots, dim)
    positions      (slots,) int32, -1 where a slot is empty
    offsets        (rows * kv_heads,) int32: where the segment of a row's head begins
    lengths        (rows * kv_heads,) int32: how many slots of it are in use, from the first

A segment may be longer than what is in use: a head that grows has slots to spare, so that a token does not copy the
others. Segments of equal size lie side by side, whatever heads they belong to, so that attention can read them
together without copying; ``offsets`` says where each is.

Padding takes no place. While a chunk of a prompt is read the layer is laid out side by side (:class:`Aligned`), which
takes the memory of one dense layer for that time; then the heads part again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.context.layer import EMPTY, ROOM, KeptLayer, Step
from vestige.errors import InputError

__all__ = ["Aligned", "RaggedLayer", "Run", "Segments"]


@dataclass(frozen=True)
class Run:
    """Segments of one size, one after the other.

    Attributes:
        first: place of the first in the order of all.
        begin: slot at which it begins.
        size: slots of each.
        heads: the numbers of the heads they are of.
    """

    first: int
    begin: int
    size: int
    heads: tuple[int, ...]

    @property
    def among(self) -> slice:
        """Their places in the order of all."""
        return slice(self.first, self.first + len(self.heads))

    def of(self, flat: Tensor) -> Tensor:
        """Their slots of a flat tensor, ``(heads, size, ...)``, not copied."""
        return flat[self.begin : self.begin + len(self.heads) * self.size].unflatten(0, (len(self.heads), self.size))


@dataclass(frozen=True)
class Segments:
    """Where the heads of a ragged layer lie. A head's number is ``row * kv_heads + head``.

    Attributes:
        sizes: slots of each head's segment.
        order: the numbers of the heads as their segments follow one another, the smallest segments first.
        offsets: where each head's segment begins.
        runs: segments of one size that follow one another.
    """

    sizes: tuple[int, ...]

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.sizes)), key=self.sizes.__getitem__))

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        begins = dict(
            zip(self.order, itertools.accumulate((self.sizes[h] for h in self.order), initial=0), strict=False)
        )
        return tuple(begins[head] for head in range(len(self.sizes)))

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        found, first, begin = [], 0, 0
        for size, run in itertools.groupby(self.order, key=self.sizes.__getitem__):
            heads = tuple(run)
            found.append(Run(first, begin, size, heads))
            first, begin = first + len(heads), begin + size * len(heads)
        return tuple(found)

    @property
    def total(self) -> int:
        return sum(self.sizes)


class RaggedLayer(KeptLayer):
    """The kept entries of one layer, a budget per head.

    Attributes:
        keys, values: ``(slots, dim)`` flat.
        positions: ``(slots,)``.
        state: per-entry tensors of the policy, ``(slots,)`` each.
        offsets, lengths: ``(rows * kv_heads,)`` int32.
        order: ``(rows * kv_heads,)`` heads in the order of their segments; ``inverse`` says where each stands there.
        rows, kv_heads: sizes.
        granted: entries that each head was allowed when the heads parted, of ``granted_of[row]`` per head together.
    """

    def __init__(self, origin: KeptLayer, rows: int, kv_heads: int) -> None:
        super().__init__(origin.cache, origin.index)
        self.rows, self.kv_heads, self.seen = rows, kv_heads, origin.seen
        self.dtype, self.device, self.is_initialized = origin.dtype, origin.device, True
        self.aside = origin.aside
        self.granted: Sequence[int] = ()
        self.granted_of: Sequence[int] = ()
        self._index: tuple[Tensor, Tensor] | None = None  # of _slot_index(), for the time of one pass

    @classmethod
    def pack(
        cls,
        layer: KeptLayer,
        kept: Bool[Tensor, "rows kv slots"],
        granted: Sequence[int],
        granted_of: Sequence[int],
    ) -> RaggedLayer:
        """The entries of a dense layer that are ``kept``; segments are as long as what is in them."""
        packed = cls(layer, *kept.shape[:2])
        packed.granted, packed.granted_of = granted, granted_of
        packed._lay(tuple(kept.sum(dim=2).flatten().tolist()))
        which, slot = kept.flatten(0, 1)[packed.order].nonzero(as_tuple=True)
        head = packed.order[which]
        place = (head // packed.kv_heads, head % packed.kv_heads, slot)
        packed.keys, packed.values = layer.keys[place], layer.values[place]
        packed.positions = layer._positions(layer.slots)[place]
        packed.state = {name: tensor[place] for name, tensor in layer.state.items()}
        return packed

    def _lay(self, used: tuple[int, ...], sizes: tuple[int, ...] | None = None) -> None:
        """Say where the segments lie and how much of them is in use."""
        self.used, self.segments, self._index = used, Segments(sizes or used), None
        self.offsets = torch.tensor(self.segments.offsets, dtype=torch.int32, device=self.device)
        self.lengths = torch.tensor(used, dtype=torch.int32, device=self.device)
        self.order = torch.tensor(self.segments.order, device=self.device)
        self.inverse = self.order.argsort()

    @property
    def slots(self) -> int:
        """Entries of the head that holds most."""
        return max(self.used)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.rows, self.kv_heads

    @property
    def entries(self) -> Aligned:
        return Aligned(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self.cache.step
        if step is not None and not step.decoding:
            whole = self.cache.layers[self.index] = self.entries.dense()
            return whole.update(key_states, value_states)
        super().update(key_states, value_states)
        return key_states, value_states  # attention reads the layer

    def _append(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """One more entry for every head."""
        self._write(step, keys, values, None)

    def _write_within(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Decode within the budgets: a head that is full gives the slot of its lowest-ranked entry to the new one."""
        assert step.allowed is not None
        limits = self.limits(step.allowed, step.real)
        if any(used > limit for used, limit in zip(self.used, limits, strict=True)):
            self.keep(step.allowed, room=1)
            parted = self.cache.layers[self.index]
            assert isinstance(parted, RaggedLayer)
            parted._write_within(step, keys, values)
            return
        self._write(step, keys, values, limits)

    def limits(self, budgets: list[int], real: list[int]) -> list[int]:
        """Entries that each head may hold after ``real`` tokens per row."""
        by_head = self._ranking.head_budgets(real, self.index)
        if by_head is not None:
            return [limit for heads in by_head for limit in heads]
        grown = [now - then for now, then in zip(self._allowed(budgets, real), self.granted_of, strict=True)]
        return [granted + grown[head // self.kv_heads] for head, granted in enumerate(self.granted)]

    def _write(self, step: Step, keys: Tensor, values: Tensor, limits: list[int] | None) -> None:
        """Write one entry per head: behind the others where the head may grow, else in the place of the lowest."""
        grows = [limits is None or used < limits[head] for head, used in enumerate(self.used)]
        if any(grow and used == size for grow, used, size in zip(grows, self.used, self.segments.sizes, strict=True)):
            self._make_room(step, grows, bounded=limits is not None)
        if all(grows):
            slot = self.lengths
        else:
            slot = self._victims(step, grows)
            if any(grows):
                slot = torch.where(_flags(tuple(grows), self.device), self.lengths, slot)
        where = (self.offsets + slot).long()
        if not all(grows):
            self._lose(where, grows)
        self.keys.index_copy_(0, where, keys.flatten(0, 2))
        self.values.index_copy_(0, where, values.flatten(0, 2))
        assert self.positions is not None
        if min(step.real) == max(step.real):
            self.positions.index_fill_(0, where, step.real[0] - 1)
        else:
            self.positions.index_copy_(0, where, self._new_positions(step).flatten())
        for tensor in self.state.values():
            tensor.index_fill_(0, where, 0)
        if any(grows):
            self.used, self._index = tuple(used + grow for used, grow in zip(self.used, grows, strict=True)), None
            self.lengths += 1 if all(grows) else _flags(tuple(grows), self.device)

    def _lose(self, where: Int[Tensor, " heads"], grows: list[bool]) -> None:
        """Tell the policy of the entries in whose place new ones are about to be written."""
        ranking = self._ranking
        if not ranking.needs_lost:
            return

        def by_head(flat: Tensor) -> Tensor:
            return flat.view(self.rows, self.kv_heads, 1, *flat.shape[1:])

        gone = ~_flags(tuple(grows), self.device)
        ranking.lose(self, by_head(self.keys[where]), by_head(self.values[where]), by_head(gone))

    def _make_room(self, step: Step, grows: list[bool], bounded: bool) -> None:
        """Lengthen the segments of heads that grow and are full: by a share of what they hold, within the budget."""
        spare = [ROOM + used // ROOM if grow else 0 for grow, used in zip(grows, self.used, strict=True)]
        if bounded:
            ranking = self._ranking
            ahead = [real + ROOM for real in step.real]
            limits = self.limits([ranking.budget_tokens(real) for real in ahead], ahead)
            spare = [
                max(min(more, limit - used), int(grow))
                for more, limit, used, grow in zip(spare, limits, self.used, grows, strict=True)
            ]
        sizes = zip(self.segments.sizes, self.used, spare, strict=True)
        self._rebuild(range(len(self.used)), [size if size > used else used + more for size, used, more in sizes])

    def _rebuild(self, heads: Sequence[int], sizes: Sequence[int]) -> None:
        """Lay the segments out anew: those of ``heads``, which may repeat, each with a new size."""
        old, used = self.segments, tuple(self.used[head] for head in heads)
        self._lay(used, tuple(sizes))
        number = torch.arange(sum(used), device=self.device)
        ends = torch.tensor(list(itertools.accumulate(used)), device=self.device)
        lengths = self.lengths.long()
        owner = torch.repeat_interleave(lengths, output_size=sum(used))
        within = number - (ends - lengths)[owner]
        begins = torch.tensor([old.offsets[head] for head in heads], device=self.device)
        source, target = begins[owner] + within, self.offsets[owner] + within

        def moved(flat: Tensor, empty: int = 0) -> Tensor:
            new = flat.new_full((self.segments.total, *flat.shape[1:]), empty)
            new[target] = flat[source]
            return new

        assert self.positions is not None
        self.keys, self.values, self.positions = moved(self.keys), moved(self.values), moved(self.positions, EMPTY)
        self.state = {name: moved(tensor) for name, tensor in self.state.items()}

    def _victims(self, step: Step, grows: list[bool]) -> Int[Tensor, " heads"]:
        """The slot, within its segment, that each head gives up which does not grow."""
        ranking = self._ranking
        if not ranking.by_age:
            rank = self.entries._rank(self._allowed(step.allowed or [], step.real), step.real, empty=float("inf"))
            return rank.argmin(dim=2).flatten()
        assert self.positions is not None
        oldest = []
        for run in self.segments.runs:
            if all(grows[head] for head in run.heads):
                oldest.append(self.order.new_zeros(len(run.heads)))
                continue
            positions = run.of(self.positions)
            # Empty slots, and what stands for no single token, have negative positions.
            spared = positions < ranking.sinks
            oldest.append(positions.masked_fill(spared, torch.iinfo(torch.int32).max).argmin(dim=1))
        return torch.cat(oldest)[self.inverse]

    def _slot_index(self) -> tuple[Int[Tensor, "rows kv slots"], Bool[Tensor, "rows kv slots"]]:
        """The flat slot of every head's entries, side by side, and which of them are in use."""
        if self._index is not None:
            return self._index
        slot = torch.arange(self.slots, device=self.device)
        used = (slot < self.lengths[:, None]).view(self.rows, self.kv_heads, -1)
        flat = (self.offsets[:, None] + slot).clamp_(max=self.segments.total - 1).view(used.shape)
        if self.cache.step is not None:
            self._index = flat, used
        return flat, used

    def let_go(self) -> None:
        """Forget what was worked out for one pass."""
        self._index = None

    def _positions(self, count: int) -> Int[Tensor, "rows kv slots"]:
        assert self.positions is not None
        flat, used = self._slot_index()
        return self.positions[flat].masked_fill(~used, EMPTY)

    def _new_positions(self, step: Step) -> Int[Tensor, "rows kv count"]:
        real = torch.tensor(step.real, dtype=torch.int32, device=self.device) - 1
        return real[:, None, None].expand(self.rows, self.kv_heads, 1)

    def keep(self, budgets: list[int], room: int = 0) -> None:
        self.entries.dense().keep(budgets, room)

    def valid(self) -> Tensor | None:
        return self._positions(self.slots) != EMPTY

    def tensors(self) -> dict[str, Tensor]:
        layout = {"offsets": self.offsets, "lengths": self.lengths, "order": self.order, "inverse": self.inverse}
        return super().tensors() | layout

    def _rewrite(self, change: Any) -> None:
        super()._rewrite(change)
        self.offsets, self.lengths = change(self.offsets), change(self.lengths)
        self.order, self.inverse = change(self.order), change(self.inverse)

    def _select(self, rows: list[int]) -> None:
        """Go on with some of the rows, which may repeat."""
        heads = [row * self.kv_heads + head for row in rows for head in range(self.kv_heads)]
        self.granted, self.granted_of = [self.granted[h] for h in heads], [self.granted_of[r] for r in rows]
        index = torch.tensor(rows, device=self.device)
        self.rows, self.aside = len(rows), {name: tensor[index] for name, tensor in self.aside.items()}
        self._rebuild(heads, [self.segments.sizes[head] for head in heads])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(self.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.rows, device=indices.device)[indices].tolist())

    def crop(self, tokens: int) -> None:
        if tokens < 0 or tokens < self.seen:
            raise InputError("a cache that has dropped or ranked entries cannot be rolled back")


class Aligned(KeptLayer):
    """A ragged layer as policies see it: its heads' entries side by side, short ones filled up with empty slots.

    Keys and values are gathered when they are asked for. What a policy sets in ``state`` goes back by :meth:`commit`.
    """

    def __init__(self, origin: RaggedLayer) -> None:
        self.origin = origin
        self.cache, self.index, self.seen = origin.cache, origin.index, origin.seen
        self.dtype, self.device, self.is_initialized = origin.dtype, origin.device, True
        self._flat, self._used = origin._slot_index()
        self._room: dict[str, Tensor] = {}
        self.aside = origin.aside
        self.state = {name: self._aligned(tensor) for name, tensor in origin.state.items()}

    @property
    def slots(self) -> int:
        return self._flat.shape[2]

    @functools.cached_property
    def keys(self) -> Float[Tensor, "rows kv slots dim"]:  # type: ignore[override]
        return self._aligned(self.origin.keys)

    @functools.cached_property
    def values(self) -> Float[Tensor, "rows kv slots dim"]:  # type: ignore[override]
        return self._aligned(self.origin.values)

    @functools.cached_property
    def positions(self) -> Int[Tensor, "rows kv slots"]:  # type: ignore[override]
        assert self.origin.positions is not None
        return self._aligned(self.origin.positions, EMPTY)

    def _aligned(self, flat: Tensor, empty: int = 0) -> Tensor:
        unused = ~self._used if flat.dim() == 1 else ~self._used[..., None]
        return flat[self._flat].masked_fill(unused, empty)

    def valid(self) -> Tensor | None:
        return self._used

    def commit(self) -> None:
        """Take what the policy has written down back into the ragged layer."""
        origin = self.origin
        for name, tensor in self.state.items():
            flat = tensor.new_zeros(origin.segments.total)
            origin.state[name] = flat.index_add_(0, self._flat.flatten(), tensor.masked_fill(~self._used, 0).flatten())

    def dense(self) -> _Whole:
        """The same as a layer of its own, to read a chunk of a prompt with."""
        return _Whole(self)


class _Whole(KeptLayer):
    """A ragged layer laid out side by side for the time of a chunk; its heads part again when it settles."""

    def __init__(self, aligned: Aligned) -> None:
        super().__init__(aligned.cache, aligned.index)
        self.dtype, self.device, self.is_initialized = aligned.dtype, aligned.device, True
        self.keys, self.values, self.positions = aligned.keys, aligned.values, aligned.positions
        self.state, self.aside, self.seen = aligned.state, aligned.aside, aligned.seen
        self._origin = aligned.origin

    def valid(self) -> Tensor | None:
        assert self.positions is not None
        return self.positions != EMPTY

    def keep(self, budgets: list[int], room: int = 0) -> None:
        """Share the budget out anew; while decoding, only in the rows in which a head holds too much."""
        real = self.cache.real
        allowed = self._allowed(budgets, real)
        places = [budget - room for budget in allowed]
        rank = self._rank(allowed, real, empty=float("-inf"))
        shares = self._shares(rank, places, room)
        if shares is None:
            shares = torch.tensor(places, device=self.device)[:, None].repeat(1, rank.shape[1])
        if room:
            origin = self._origin
            fits = [used <= limit for used, limit in zip(origin.used, origin.limits(budgets, real), strict=True)]
            for row in range(origin.rows):
                own = slice(row * origin.kv_heads, (row + 1) * origin.kv_heads)
                if all(fits[own]):
                    shares[row] = torch.tensor(origin.limits(budgets, real)[own], device=self.device) - room
        self._part(rank, shares, places)

    def settle(self, step: Step) -> None:
        if step.allowed is not None:
            self.keep(step.allowed)
            return
        held = self.valid()
        assert held is not None
        parted = RaggedLayer.pack(self, held, self._origin.granted, self._origin.granted_of)
        self.cache.layers[self.index] = parted


@functools.lru_cache(maxsize=256)
def _flags(flags: tuple[bool, ...], device: torch.device) -> Bool[Tensor, " heads"]:
    """The same flags come step after step; making a tensor of them each time would cost a transfer."""
    with torch.inference_mode(False):
        return torch.tensor(flags, device=device)
