"""What one layer of a kept cache holds, and what a forward pass means for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vestige.errors import InputError, PatchError

if TYPE_CHECKING:
    from vestige.context.cache import KeptCache
    from vestige.context.policy import Ranking

__all__ = ["EMPTY", "ROOM", "KeptLayer", "Step", "all_at_slots", "all_runs", "at_slots", "per_row"]

EMPTY = -1  # position of a slot that holds no entry
ROOM = 16  # a cache that grows while decoding is made larger by the 16th part of what it holds, and this many slots


@dataclass
class Step:
    """One forward pass through the cache.

    Attributes:
        count: tokens (columns) that come in.
        start: columns seen before.
        positions: ``(batch, count)`` index of each token among its row's real tokens, ``EMPTY`` for padding;
            ``None`` while no row has had padding.
        age: ``(count,)`` or ``(batch, count)`` number of later real tokens in the chunk, for weights that decay.
        fresh: real tokens in the chunk, per row.
        real: real tokens seen per row, this chunk included.
        allowed: entries that each row may hold once the pass is done; ``None`` where nothing is dropped now.
        turn: decoding steps since the last chunk of the prompt, this one included; 0 for a chunk.
        ends_real: whether the last column is a real token in every row.
        shared: what the layers tell one another during the pass.
    """

    count: int
    start: int
    positions: Tensor | None
    age: Tensor
    fresh: list[int]
    real: list[int]
    allowed: list[int] | None
    turn: int = 0
    ends_real: bool = True
    shared: dict[str, Any] = field(default_factory=dict)

    def rows(self, device: torch.device) -> int | Int[Tensor, "batch 1 1"]:
        """``real``, to be compared with positions."""
        return per_row(self.real, device)

    @property
    def decoding(self) -> bool:
        """Whether this is one token after others (and not a prompt)."""
        return self.count == 1 and self.start > 0


class KeptLayer(CacheLayerMixin):
    """The kept entries of one layer.

    Attributes:
        keys, values: ``(batch, kv_heads, slots, dim)``.
        positions: ``(batch, kv_heads, slots)`` int32, or ``None`` while slot *i* simply holds token *i*.
        state: per-entry tensors of the policy, ``(batch, kv_heads, slots)`` each; they move with the entries.
        aside: other tensors of the policy, batch first, which belong to no single entry.
    """

    is_sliding = False

    def __init__(self, cache: KeptCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.positions: Tensor | None = None
        self.state: dict[str, Tensor] = {}
        self.aside: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # storage with slots to spare, of which keys and values are the first
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    @property
    def cache(self) -> KeptCache:
        """The cache that the layer is part of, which is not held: it goes, with all that it holds, when its user lets
        it go."""
        cache = self._cache()
        assert cache is not None, "a layer is used within its cache"
        return cache

    @cache.setter
    def cache(self, cache: KeptCache) -> None:
        self._cache = weakref.ref(cache)

    @property
    def slots(self) -> int:
        """Entries held per head, empty slots included."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows of the batch, and key-value heads."""
        return self.keys.shape[0], self.keys.shape[1]

    def shares(self, other: KeptLayer) -> bool:
        """Whether the entries lie in the same storage as another's."""
        return self.keys is other.keys

    @property
    def entries(self) -> KeptLayer:
        """The entries as policies and watchers see them: the heads' side by side."""
        return self

    def commit(self) -> None:
        """Take over what a policy has written down about :attr:`entries`."""

    @property
    def _ranking(self) -> Ranking:
        """What ranks the entries; asked for only where some may be dropped."""
        ranking = self.cache.policy.ranking
        assert ranking is not None
        return ranking

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new entries: into the slot of the one given up if the budget is full, else after the others."""
        if self.cache.slots_step is not None:
            self.cache.slots_step.write(self.index, key_states, value_states)
        else:
            self._enter(key_states, value_states)
        return self.keys, self.values

    def _enter(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.cache.step
        if step is None or step.start != self.seen:
            raise PatchError("a kept cache is filled by a forward pass of the model that it was made for")
        self.seen += step.count
        if step.decoding and step.allowed is not None:
            self._write_within(step, key_states, value_states)
        else:
            self._append(step, key_states, value_states)

    def _append(self, step: Step, keys: Tensor, values: Tensor) -> None:
        held, count = self.slots, step.count
        if self.positions is not None or step.positions is not None:
            new = self._new_positions(step)
            # The heads' positions are one at first; each head will write its own.
            self.positions = new.contiguous() if held == 0 else torch.cat([self._positions(held), new], dim=2)
        self._store(step, keys, values)
        self._note_nothing(held + count)

    def _note_nothing(self, slots: int) -> None:
        """Let the state be that of so many slots: of the last ones nothing is known yet."""
        for name, tensor in self.state.items():
            if tensor.shape[2] < slots:
                self.state[name] = torch.nn.functional.pad(tensor, (0, slots - tensor.shape[2]))

    def _store(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Put new keys and values after the others."""
        if step.decoding and self.slots:
            spare = ROOM + self.slots // ROOM
            if step.allowed is not None:
                spare = min(spare, max(step.allowed) - self.slots - 1)
            self.keys, self.values = (
                self._into_room(name, held, new, max(0, spare))
                for name, held, new in (("keys", self.keys, keys), ("values", self.values, values))
            )
            return
        self.keys = torch.cat([self.keys, keys], dim=2) if self.slots else keys
        self.values = torch.cat([self.values, values], dim=2) if self.slots else values
        self._room = {}

    def _into_room(self, name: str, held: Tensor, new: Tensor, spare: int) -> Tensor:
        """One more entry behind those held, without copying them where there is room."""
        end = held.shape[2] + 1
        room = self._room.get(name)
        if room is None or room.data_ptr() != held.data_ptr() or room.shape[2] < end:
            room = held.new_empty(*held.shape[:2], end + spare, held.shape[3])
            room[:, :, : end - 1] = held
            self._room[name] = room
        room[:, :, end - 1 : end] = new
        return room[:, :, :end]

    def _write_within(self, step: Step, keys: Tensor, values: Tensor) -> None:
        """Decode within the budget: the lowest-ranked entry gives its slot to the new one."""
        assert step.allowed is not None
        allowed = self._allowed(step.allowed, step.real)
        by_head = self._ranking.head_budgets(step.real, self.index)
        full = self.slots > max(allowed) if by_head is None else self.slots >= min(map(min, by_head))
        if full or self._ranking.lag > 1:
            self.keep(step.allowed, room=1)
            if (now := self.cache.layers[self.index]) is not self:
                now._write_within(step, keys, values)
                return
        held = self._held()
        grows = [before < budget for before, budget in zip(held, allowed, strict=True)]
        if any(grow and before == self.slots for grow, before in zip(grows, held, strict=True)):
            self._append(step, keys, values)
            if not all(grows):  # rows at their budget give up an entry, which leaves an empty slot
                positions = self._written_positions()
                victim = self._victim(step, allowed, [False] * len(grows), spare_last=True)
                emptied = positions.gather(2, victim)
                emptied[~torch.tensor(grows, device=self.device)] = EMPTY
                self.positions = positions.scatter(2, victim, emptied)
            return
        self._written_positions()
        self._replace(self._victim(step, allowed, grows), step, keys, values)

    def _replace(self, victim: Int[Tensor, "batch kv 1"], step: Step, keys: Tensor, values: Tensor) -> None:
        """Write one new entry in each head in the place of another."""
        positions = self._written_positions()
        where = victim[..., None]
        self.keys.scatter_(2, where.expand(-1, -1, -1, self.keys.shape[3]), keys)
        self.values.scatter_(2, where.expand(-1, -1, -1, self.values.shape[3]), values)
        positions.scatter_(2, victim, self._new_positions(step))
        for tensor in self.state.values():
            tensor.scatter_(2, victim, 0)

    def _victim(
        self, step: Step, allowed: list[int], grows: list[bool], spare_last: bool = False
    ) -> Int[Tensor, "batch kv 1"]:
        """The slot to give up in each head: an empty one where the row may grow, else the lowest-ranked."""
        rank = self._rank(allowed, step.real, empty=float("inf"))
        if spare_last:
            rank[..., -1] = float("inf")
        if self.cache.padded and any(grows):
            take_empty = torch.tensor(grows, device=self.device)[:, None, None] & (self.positions == EMPTY)
            rank = rank.masked_fill(take_empty, float("-inf"))
        return rank.argmin(dim=2, keepdim=True)

    def _rank(self, allowed: list[int], real: list[int], empty: float) -> Float[Tensor, "batch kv slots"]:
        """The score of each entry; the largest number for recent tokens, infinity for sinks, ``empty`` elsewhere."""
        policy = self._ranking
        recent = per_row([policy.recent_tokens(budget) for budget in allowed], self.device)
        positions = self._positions(self.slots)
        # Comparisons cost as much as the score itself in a decoding step: only those that can find something are made.
        rank = policy.score(self.entries)
        rank = rank.masked_fill(positions >= per_row(real, self.device) - recent, torch.finfo(rank.dtype).max)
        if policy.sinks:
            rank = rank.masked_fill(positions < policy.sinks, float("inf"))
        return rank if self.valid() is None else rank.masked_fill(positions == EMPTY, empty)

    def _allowed(self, budgets: list[int], real: list[int]) -> list[int]:
        """What each row's heads may hold in this layer, where ``budgets`` is the mean of all layers."""
        return self._ranking.layer_budgets(budgets, real, self.index, len(self.cache.layers))

    def _held(self) -> list[int]:
        """Entries that each row's heads hold."""
        if not self.cache.padded or self.positions is None:
            return [self.slots] * self.sizes[0]
        return (self.positions[:, 0] != EMPTY).sum(dim=1).tolist()

    def settle(self, step: Step) -> None:
        """Drop what the budget does not allow once a chunk has been attended to."""
        if step.allowed is not None:
            self.keep(step.allowed)

    def keep(self, budgets: list[int], room: int = 0) -> None:
        """Drop all but the highest-ranked entries of each row's heads, so many that ``room`` more fit the budget.

        The first ``sinks`` tokens and the last ``recent`` ones rank above all others. Where the policy gives the
        heads unequal shares of ``budgets[row]``, a ragged layer takes the place of this one in the cache.
        """
        if not self.is_initialized:
            return
        self._note_nothing(self.slots)  # of entries that a captured step has appended
        real = self.cache.real
        allowed = self._allowed(budgets, real)
        by_head = self._ranking.head_budgets(real, self.index)
        if (min(allowed) if by_head is None else min(map(min, by_head))) - room >= self.slots:
            return
        places = [budget - room for budget in allowed]
        rank = self._rank(allowed, real, empty=float("-inf"))
        shares = self._shares(rank, places, room)
        if shares is not None:
            self._part(rank, shares, places)
            return
        width = min(max(places), self.slots)
        order = rank.topk(width, dim=2).indices
        if min(places) < width or self.cache.padded:
            beyond = torch.arange(width, device=self.device) >= per_row(places, self.device)
            order, moved = order.sort(dim=2)
            beyond = beyond.expand_as(order).gather(2, moved)
        else:
            order, beyond = order.sort(dim=2).values, None
        positions = self._positions(self.slots)
        self._gather(order)
        self.positions = positions.gather(2, order)
        if beyond is not None:
            self.positions = self.positions.masked_fill(beyond, EMPTY)
        self.tidy()

    def tidy(self) -> None:
        """Whatever a layer has to do once entries have been dropped."""

    def _shares(self, rank: Tensor, places: list[int], room: int) -> Int[Tensor, "batch kv"] | None:
        """What each head may keep, where the policy gives the heads unequal parts."""
        by_head = self._ranking.head_budgets(self.cache.real, self.index)
        if by_head is not None:
            return torch.tensor(by_head, device=self.device) - room
        return self._ranking.share_out(rank, places)

    def _part(self, rank: Tensor, shares: Tensor, places: list[int]) -> None:
        """Let the heads go apart: each keeps its share of the entries, stored as they come."""
        from vestige.context.ragged import RaggedLayer

        order = rank.argsort(dim=2, stable=True)  # of equals the older goes first
        above = torch.arange(self.slots, device=self.device) >= self.slots - shares[..., None]
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(2, order, above.expand_as(rank))
        held = self._positions(self.slots) != EMPTY
        kept &= held
        if self._ranking.needs_lost:
            self._ranking.lose(self, self.keys, self.values, held & ~kept)
        self.cache.layers[self.index] = RaggedLayer.pack(self, kept, shares.flatten().tolist(), places)

    def _gather(self, slots: Int[Tensor, "batch kv kept"]) -> None:
        index = slots[..., None]
        self._room = {}
        self.keys = self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[3]))
        self.state = {name: tensor.gather(2, slots) for name, tensor in self.state.items()}

    def _written_positions(self) -> Int[Tensor, "batch kv slots"]:
        """The positions, written out if they were implicit, to be changed in place."""
        if self.positions is None:
            self.positions = self._positions(self.slots).contiguous()
        return self.positions

    def _positions(self, count: int) -> Int[Tensor, "batch kv slots"]:
        """Position of each held entry, made where it has been left implicit."""
        if self.positions is not None:
            return self.positions
        batch, heads = self.sizes
        return torch.arange(count, device=self.device, dtype=torch.int32).expand(batch, heads, count)

    def _new_positions(self, step: Step) -> Int[Tensor, "batch kv count"]:
        batch, heads = self.sizes
        if step.positions is None:
            new = torch.arange(step.start, step.start + step.count, device=self.device, dtype=torch.int32)
        else:
            new = step.positions.to(torch.int32)[:, None, :]
        return new.expand(batch, heads, step.count)

    def valid(self) -> Tensor | None:
        """``(batch, kv_heads, slots)`` slots that hold an entry; ``None`` where all do."""
        return self.positions != EMPTY if self.positions is not None and self.cache.padded else None

    def tensors(self) -> dict[str, Tensor]:
        """All that the layer holds, by name, of which the first word is the part that it belongs to."""
        if not self.is_initialized:
            return {}
        positions = {} if self.positions is None else {"positions": self.positions}
        return self._stored() | positions | self.state | self.aside

    def _stored(self) -> dict[str, Tensor]:
        """What the keys and values lie in."""
        return {"keys": self.keys, "values": self.values}

    def _rewrite_stored(self, change: Any) -> None:
        self.keys, self.values, self._room = change(self.keys), change(self.values), {}

    def _rewrite(self, change: Any) -> None:
        if not self.is_initialized:
            return
        self._rewrite_stored(change)
        if self.positions is not None:
            self.positions = change(self.positions)
        self.state = {name: change(tensor) for name, tensor in self.state.items()}
        self.aside = {name: change(tensor) for name, tensor in self.aside.items()}

    def get_seq_length(self) -> int:
        """Tokens seen, not held: what comes next stands at this position."""
        return self.seen

    def get_query_offset(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + count, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.positions = None
        self.state, self.aside, self._room, self.seen, self.is_initialized = {}, {}, {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rewrite(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rewrite(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rewrite(lambda tensor: tensor[indices])

    def crop(self, tokens: int) -> None:
        """Drop the last tokens (negative count, or the length to keep); only where nothing has been dropped."""
        remove = -tokens if tokens < 0 else self.seen - tokens
        if remove <= 0 or not self.is_initialized:
            return
        if self.slots != self.seen or self.cache.padded or self.state or self.aside:
            raise InputError("a cache that has dropped or ranked entries cannot be rolled back")
        self.rewind(remove)

    def rewind(self, count: int) -> None:
        """Forget the last tokens, which must be the last entries."""
        self.seen -= count
        self._room = {}
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        if self.positions is not None:
            self.positions = self.positions[:, :, :-count]
        self.state = {name: tensor[:, :, :-count] for name, tensor in self.state.items()}


def per_row(numbers: list[int] | list[float], device: torch.device) -> Any:
    """Numbers to compare with ``(batch, kv_heads, slots)``: one int where all rows agree, which costs no transfer."""
    if min(numbers) == max(numbers):
        return numbers[0]
    return torch.tensor(numbers, device=device)[:, None, None]


def at_slots(tensor: Tensor, slots: Int[Tensor, "batch kv picked"]) -> Tensor:
    """Some entries of ``(batch, kv_heads, slots, ...)``, each copied in one piece where it lies in one."""
    return all_at_slots((tensor,), slots)[0]


def all_at_slots(tensors: Sequence[Tensor], slots: Int[Tensor, "batch kv picked"]) -> list[Tensor]:
    """The same entries of several tensors; where they lie is worked out once for those laid out alike."""
    lines: dict[tuple[int, ...], Tensor] = {}
    return [_at_slots(tensor, slots, lines) for tensor in tensors]


def _at_slots(tensor: Tensor, slots: Tensor, lines: dict[tuple[int, ...], Tensor]) -> Tensor:
    if tensor.dim() == 3:
        return tensor.gather(2, slots)
    width, strides = tensor.shape[3:].numel(), tensor.stride()
    whole = tensor.dim() == 4 and strides[3] == 1 and tensor.numel() > 0
    if not whole or any(stride % width for stride in strides[:3]):
        index = slots.view(*slots.shape, *[1] * (tensor.dim() - 3))
        return tensor.gather(2, index.expand(*slots.shape, *tensor.shape[3:]))
    row, head, slot = (stride // width for stride in strides[:3])
    batch, heads, held = tensor.shape[:3]
    rows = tensor.as_strided((1 + (batch - 1) * row + (heads - 1) * head + (held - 1) * slot, width), (width, 1))
    line = lines.get((row, head, slot))
    if line is None:
        first = torch.arange(heads, device=tensor.device) * head
        if batch > 1:
            first = first + torch.arange(batch, device=tensor.device)[:, None] * row
        line = ((slots if slot == 1 else slots * slot) + first[..., None]).flatten()
        lines[row, head, slot] = line
    return rows.index_select(0, line).view(*slots.shape, width)


def all_runs(
    tensors: Sequence[Tensor], first: Int[Tensor, "batch kv runs"], length: int, begins: dict[Any, Tensor]
) -> list[Tensor]:
    """The same runs of ``length`` entries each, from the ``first`` slots on, of several ``(batch, kv_heads, slots,
    dim)``, side by side: ``(batch, kv_heads, runs * length, dim)``. A run is copied in one piece where it lies in one.

    Where the heads begin is kept in ``begins``, for the layers after this one.
    """
    found = []
    for tensor in tensors:
        (batch, heads, held, width), strides = tensor.shape, tensor.stride()
        if strides[2:] != (width, 1) or strides[0] % width or strides[1] % width:
            slots = first[..., None] + torch.arange(length, device=first.device)
            found.append(at_slots(tensor, slots.flatten(2)))
            continue
        row, head = strides[0] // width, strides[1] // width
        begin = begins.get((row, head))
        if begin is None:
            every = torch.arange(batch, device=first.device)[:, None] * row
            begin = (every + torch.arange(heads, device=first.device) * head)[..., None]
            begins[row, head] = begin
        last = (batch - 1) * row + (heads - 1) * head + held - length
        pieces = tensor.as_strided((last + 1, length * width), (width, 1)).index_select(0, (begin + first).flatten())
        found.append(pieces.view(batch, heads, -1, width))
    return found
