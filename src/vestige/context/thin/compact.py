"""Entries in a compact form, but for the most recent ones: what the policies of this room share.

A layer's slots are, in this order, the *old* entries, held compact, and a *window* of the last ones at full width.
Every token that comes pushes the oldest of the window among the old ones, so what is compact depends on the text alone,
and not on the batch. Which slots there are is the business of another policy, which may drop entries: it sees the layer
as if all were at full width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.context.around import Around
from vestige.context.attention import Look, Reading, readable
from vestige.context.cache import KeptCache
from vestige.context.evict.full import Full
from vestige.context.layer import EMPTY, ROOM, KeptLayer, Step, at_slots
from vestige.context.policy import CachePolicy, Ranking
from vestige.core.method import param
from vestige.errors import SpecError

__all__ = ["CompactLayer", "Thin"]

Form = dict[str, Tensor]
"""Entries in compact form: tensors ``(batch, kv_heads, entries, ...)`` by name, ``keys ...`` and ``values ...``."""


class Thin(Around):
    """A policy that holds old entries in a compact form, over one that says which entries there are."""

    policy: CachePolicy = param(factory=Full, help="what says which entries are kept")
    full_width: int = param(32, "last entries of a head that are held at full width", ge=1)

    def check(self) -> None:
        inner = self.policy
        ranking = inner.ranking
        if ranking is None:
            raise SpecError(f"{self.name}: parameter 'policy' is {inner.name}; allowed: full, and policies that evict")
        unequal = [hook for hook in ("head_budgets", "share_out", "stand_in") if _overrides(inner, Ranking, hook)]
        own_way = [hook for hook in ("present", "respond", "new_layer") if _overrides(inner, CachePolicy, hook)]
        if unequal or own_way:
            reason = "gives heads unequal numbers of entries" if unequal else "changes or reads entries in its own way"
            raise SpecError(
                f"{self.name}: parameter 'policy' is {inner.name}, which {reason}; that cannot be held compact"
            )
        budget = getattr(inner, "budget", None)
        if type(budget) is int and budget <= self.full_width:
            raise SpecError(
                f"{self.name}: parameter 'full_width' is {self.full_width}; the policy keeps {budget} entries, "
                "so that none would be held compact"
            )

    # What the compact form is.

    def prepare(self, layer: CompactLayer, keys: Tensor, valid: Tensor | None, rows: Bool[Tensor, " batch"]) -> None:
        """Settle what the form depends on, in rows that are about to have their first compact entry.

        ``keys`` are all that such a row holds, ``valid`` says which are entries.
        """

    def prepared(self, layer: CompactLayer) -> None:
        """All rows have been prepared."""

    def encode(self, layer: CompactLayer, keys: Tensor, values: Tensor) -> Form:
        """Bring entries at full width, ``(batch, kv_heads, entries, dim)``, into compact form."""
        raise NotImplementedError

    def decode(self, layer: CompactLayer, form: Form) -> tuple[Tensor, Tensor]:
        """Keys and values at full width again, as precise as the form has them."""
        raise NotImplementedError

    def read(self, layer: CompactLayer, look: Look, form: Form) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """How one token reads compact entries: keys with the queries that meet them, and values."""
        keys, values = self.decode(layer, form)
        return (look.query, keys.to(layer.dtype)), values.to(layer.dtype)

    @property
    def ranking(self) -> Ranking | None:
        return self.policy.ranking

    def new_layer(self, cache: KeptCache, index: int) -> KeptLayer:
        return CompactLayer(cache, index, self)

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        if not step.decoding:
            return plain()
        assert isinstance(entries, CompactLayer)
        output, share = entries.reading(look, step).attend(look)
        if self.needs_attention:
            self.receive(entries, share.squeeze(3), step)
        return output


class CompactLayer(KeptLayer):
    """The kept entries of one layer, the old ones compact.

    Attributes:
        old: the compact entries, with slots to spare behind them: ``old_slots`` are in use.
        window_keys, window_values: ``(batch, kv_heads, window, dim)``.
    """

    def __init__(self, cache: KeptCache, index: int, thin: Thin) -> None:
        self.thin = thin
        self._empty()
        super().__init__(cache, index)

    def _empty(self) -> None:
        self.old: Form = {}
        self.old_slots = 0
        self.window_keys = self.window_values = torch.empty(0)
        self._mixed = False  # whether the window is out of order
        self._oldest: int | None = (
            None  # where it is a ring, the same in all heads: its oldest slot; -1 where it is none
        )
        self._whole: tuple[Tensor, Tensor] | None = None  # while a chunk is read
        self._known: tuple[Tensor, Form] | None = None  # forms that some of the window had, while entries are dropped

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.window_keys, self.window_values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @property
    def slots(self) -> int:
        return self.old_slots + self.window_keys.shape[2] if self.is_initialized else 0

    @property
    def sizes(self) -> tuple[int, int]:
        return self.window_keys.shape[0], self.window_keys.shape[1]

    @property
    def form(self) -> Form:
        """The compact entries that are in use."""
        return {name: tensor[:, :, : self.old_slots] for name, tensor in self.old.items()}

    @property
    def keys(self) -> Float[Tensor, "batch kv slots dim"]:  # type: ignore[override]
        return self._wide()[0].to(self.dtype)

    @keys.setter
    def keys(self, value: None) -> None:
        """A layer of transformers begins with no keys."""

    @property
    def values(self) -> Float[Tensor, "batch kv slots dim"]:  # type: ignore[override]
        return self._wide()[1].to(self.dtype)

    @values.setter
    def values(self, value: None) -> None:
        """As with keys."""

    def _wide(self) -> tuple[Tensor, Tensor]:
        """All entries at full width. They are made once for a chunk, and each time for a single token."""
        if not self.old_slots:
            return self.window_keys, self.window_values
        if self._whole is not None:
            return self._whole
        old = self.thin.decode(self, self.form)
        windows = (self.window_keys, self.window_values)
        whole = tuple(torch.cat([part, window], dim=2) for part, window in zip(old, windows, strict=True))
        if self.cache.step is not None and not self.cache.step.decoding:
            self._whole = whole  # type: ignore[assignment]
        return whole  # type: ignore[return-value]

    def reading(self, look: Look, step: Step) -> Reading:
        """What one token reads: the compact entries as they are, and the window."""
        window = (look.query, self.window_keys)
        valid = readable(self, look, step)
        if not self.old_slots:
            return Reading((window,), self.window_values, valid)
        part, values = self.thin.read(self, look, self.form)
        return Reading((part, window), (values, self.window_values), valid)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._whole = None
        self._enter(key_states, value_states)
        return key_states, value_states  # attention reads the layer

    def _store(self, step: Step, keys: Tensor, values: Tensor) -> None:
        self.window_keys = torch.cat([self.window_keys, keys], dim=2)
        self.window_values = torch.cat([self.window_values, values], dim=2)
        self._oldest = None
        if step.decoding:
            self._compact()

    def settle(self, step: Step) -> None:
        super().settle(step)
        self.tidy()
        self._whole = None

    def tidy(self) -> None:
        """Let the last entries be the window, in the order of the text, and make the others compact."""
        if self.positions is not None:
            order = self.positions.argsort(dim=2, stable=True)  # empty slots first: they take nobody's place
            if not torch.equal(order, torch.arange(self.slots, device=self.device).expand_as(order)):
                self._gather(order)
                self.positions = self.positions.gather(2, order)
        self._mixed, self._oldest = False, None
        self._compact()

    def _compact(self) -> None:
        """Bring what is beyond the window into compact form."""
        count = max(0, self.window_keys.shape[2] - self.thin.full_width)
        if count:
            entries = None if self.positions is None else self.positions[:, :, self.old_slots :] != EMPTY
            self._prepare(self.window_keys, entries)
            form = self.thin.encode(self, self.window_keys[:, :, :count], self.window_values[:, :, :count])
            if self._known is not None:  # what was compact before is as it was
                was, known = self._known[0][:, :, :count], self._known[1]
                form = {
                    name: torch.where(_over(was, new), known[name][:, :, :count], new) for name, new in form.items()
                }
            self._append_old(form, count)
            # Copies, so that what has become compact is let go.
            self.window_keys = self.window_keys[:, :, count:].clone()
            self.window_values = self.window_values[:, :, count:].clone()
        self.window_keys, self.window_values = self.window_keys.to(self.dtype), self.window_values.to(self.dtype)
        self._known = None

    def _append_old(self, form: Form, count: int) -> None:
        end = self.old_slots + count
        for name, new in form.items():
            room = self.old.get(name)
            if room is None or room.shape[2] < end:
                spare = ROOM + end // ROOM if count == 1 else 0
                room = new.new_empty(*new.shape[:2], end + spare, *new.shape[3:])
                room[:, :, : self.old_slots] = self.form[name] if self.old_slots else 0
                self.old[name] = room
            room[:, :, self.old_slots : end] = new
        self.old_slots = end

    def _prepare(self, keys: Tensor, entries: Bool[Tensor, "batch kv slots"] | None) -> None:
        """Let the policy settle the form in rows that are about to have their first compact entry."""
        ready = self.aside.get("ready")
        if ready is not None and ready.shape[1] == 0:
            return
        batch = self.sizes[0]
        over = torch.ones(batch, dtype=torch.bool, device=self.device)
        if entries is not None and self.cache.padded:
            over = entries[:, 0].sum(dim=1) > self.thin.full_width
        rows = over if ready is None else over & ~ready[:, 0]
        self.thin.prepare(self, keys, entries, rows)
        now = rows if ready is None else rows | ready[:, 0]
        if bool(now.all()):
            now = now.new_empty(batch, 0)  # nothing is left to ask for
            self.thin.prepared(self)
        self.aside["ready"] = now.view(batch, -1)

    def _append(self, step: Step, keys: Tensor, values: Tensor) -> None:
        if self._mixed:
            self.tidy()
        super()._append(step, keys, values)

    def _replace(self, victim: Int[Tensor, "batch kv 1"], step: Step, keys: Tensor, values: Tensor) -> None:
        """The window's oldest entry goes to the slot given up, if that is old, and the new one takes its place there;
        the window is in the order of the text no more."""
        assert self.positions is not None
        old = self.old_slots
        # The entry given up is old wherever the last ones, so many as the window holds, are kept in any case.
        spared = self._ranking.recent_tokens(min(step.allowed or [0]))
        outside = old > 0 and not self.cache.padded and spared > self.thin.full_width
        if outside and self._is_ring():
            self._replace_in_ring(victim, step, keys, values)
            return
        oldest = self.positions[:, :, old:].argmin(dim=2, keepdim=True)
        out = oldest if outside else torch.where(victim < old, oldest, victim - old)
        if old:
            if not outside:
                there = torch.cat([self.positions[:, :, old:], self._new_positions(step)], dim=2) != EMPTY
                self._prepare(torch.cat([self.window_keys, keys], dim=2), there)
            form = self.thin.encode(self, *(_pick(part, out) for part in (self.window_keys, self.window_values)))
            slot = victim if outside else victim.clamp_max(old - 1)
            for name, tensor in self.form.items():
                new = form[name]
                if not outside:
                    stays = _pick(tensor, slot)
                    new = torch.where(_over(victim < old, stays), new, stays)
                _put(tensor, slot, new)
        _put(self.window_keys, out, keys)
        _put(self.window_values, out, values)
        leaves = out + old
        self.positions.scatter_(2, victim, self.positions.gather(2, leaves))
        self.positions.scatter_(2, leaves, self._new_positions(step))
        for tensor in self.state.values():
            tensor.scatter_(2, victim, tensor.gather(2, leaves))
            tensor.scatter_(2, leaves, 0)
        self._mixed = True

    def _is_ring(self) -> bool:
        """Whether all heads' windows hold the same tokens, as they do from where the last ones are always kept."""
        assert self.positions is not None
        if self._oldest is None:
            window = self.positions[:, :, self.old_slots :]
            alike = bool((window == window[:1, :1]).all())
            self._oldest = int(window[0, 0].argmin()) if alike else -1
        return self._oldest >= 0

    def _replace_in_ring(self, victim: Int[Tensor, "batch kv 1"], step: Step, keys: Tensor, values: Tensor) -> None:
        """The same where the entry given up is old in every head, and the window's oldest stands in one slot."""
        assert self.positions is not None and self._oldest is not None
        slot, place = slice(self._oldest, self._oldest + 1), self.old_slots + self._oldest
        form = self.thin.encode(self, self.window_keys[:, :, slot], self.window_values[:, :, slot])
        for name, tensor in self.old.items():
            _put(tensor, victim, form[name])
        self.window_keys[:, :, slot], self.window_values[:, :, slot] = keys, values
        self.positions.scatter_(2, victim, self.positions[:, :, place : place + 1])
        self.positions[:, :, place] = step.start
        for tensor in self.state.values():
            tensor.scatter_(2, victim, tensor[:, :, place : place + 1])
            tensor[:, :, place] = 0
        self._oldest = (self._oldest + 1) % self.window_keys.shape[2]
        self._mixed = True

    def _gather(self, slots: Int[Tensor, "batch kv kept"]) -> None:
        """Keep some entries, all at full width until they are made compact again."""
        if self.old_slots:
            form = {name: _pick(tensor, slots.clamp_max(self.old_slots - 1)) for name, tensor in self.form.items()}
            self._known = (slots < self.old_slots, form)
        elif self._known is not None:
            was, form = self._known
            self._known = (was.gather(2, slots), {name: _pick(tensor, slots) for name, tensor in form.items()})
        self.window_keys, self.window_values = (_pick(part, slots) for part in self._wide())
        self.old, self.old_slots, self._whole, self._oldest = {}, 0, None, None
        self.state = {name: tensor.gather(2, slots) for name, tensor in self.state.items()}

    def _stored(self) -> dict[str, Tensor]:
        return self.old | {"keys window": self.window_keys, "values window": self.window_values}

    def shares(self, other: KeptLayer) -> bool:
        return self.window_keys is getattr(other, "window_keys", None)

    def _rewrite_stored(self, change: Any) -> None:
        self.old = {name: change(tensor) for name, tensor in self.form.items()}
        self.window_keys, self.window_values = change(self.window_keys), change(self.window_values)

    def reset(self) -> None:
        super().reset()
        self._empty()


def _overrides(policy: CachePolicy, base: type[CachePolicy], hook: str) -> bool:
    return getattr(type(policy), hook, None) is not getattr(base, hook)


def _over(slots: Tensor, tensor: Tensor) -> Tensor:
    """``(batch, kv_heads, n)`` as it goes with ``(batch, kv_heads, n, ...)``."""
    return slots.view(*slots.shape, *[1] * (tensor.dim() - 3))


def _pick(tensor: Tensor, slots: Int[Tensor, "batch kv picked"]) -> Tensor:
    """Some entries of ``(batch, kv_heads, slots, ...)``."""
    return at_slots(tensor, slots)


def _put(tensor: Tensor, slots: Int[Tensor, "batch kv picked"], new: Tensor) -> None:
    """Write entries in their slots."""
    tensor.scatter_(2, _over(slots, new).expand_as(new), new)
