"""Keep every entry, read few of them: what the policies of this room share.

No memory is saved, and nothing is lost for good: an entry that is passed over now may be read later. What is saved
is reading. A decoding step gathers the entries that it reads, and attention runs over those alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.context.attention import Look, Reading, readable
from vestige.context.cache import budget_tokens
from vestige.context.layer import KeptLayer, Step, all_at_slots, at_slots, per_row
from vestige.context.policy import CachePolicy, check_shares
from vestige.core.method import param

__all__ = ["Picked", "Select", "last_row", "strongest"]


class Select(CachePolicy):
    """A policy that keeps every entry and reads few of them while decoding."""

    budget: int | float = param(
        1024, "entries read per head in a step: tokens (int), or a share of the tokens seen (float)", gt=0
    )

    def check(self) -> None:
        check_shares(self, "budget")

    def lossless(self, tokens: int) -> CachePolicy:
        return self.replace(budget=tokens)

    def budgets(self, step: Step) -> list[int]:
        """Entries that each row may read in a step, the newest token's own included."""
        return [budget_tokens(self.budget, real) for real in step.real]

    def read(self, entries: KeptLayer, look: Look, step: Step) -> Reading | None:
        """What one decoding step reads of a layer; ``None`` for all of it."""
        raise NotImplementedError

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        reading = self.read(entries, look, step) if step.decoding else None
        return plain() if reading is None else reading.attend(look)[0]


@dataclass(frozen=True)
class Picked:
    """Entries that were picked in each head.

    Attributes:
        slots: where they are held.
        exist: which of them are entries; a row that has fewer than another is filled up.
    """

    slots: Int[Tensor, "batch kv picked"]
    exist: Bool[Tensor, "batch kv picked"]

    def of(self, tensor: Tensor) -> Tensor:
        """The picked entries of ``(batch, kv_heads, slots, ...)``."""
        return at_slots(tensor, self.slots)

    def reading(self, entries: KeptLayer, look: Look, readable: Tensor | None) -> Reading:
        """The picked entries alone, of which a token sees those that are ``readable``."""
        valid = self.exist if readable is None else self.exist & self.of(readable)
        keys, values = all_at_slots((entries.keys, entries.values), self.slots)
        return Reading(((look.query, keys),), values, valid)


def strongest(
    rank: Float[Tensor, "batch kv slots"], counts: list[int], valid: Tensor | None, ties: bool = False
) -> Picked:
    """The ``counts[row]`` highest-ranked entries of each head, the highest first; of equals, if there may be ``ties``,
    the older."""
    if valid is not None:
        rank = rank.masked_fill(~valid, float("-inf"))
    width = min(max(counts), rank.shape[2])
    if ties:
        high, slots = (part[..., :width] for part in rank.sort(dim=2, descending=True, stable=True))
    else:
        high, slots = rank.topk(width, dim=2)
    exist = high > float("-inf")
    if min(counts) < slots.shape[2]:
        exist &= torch.arange(slots.shape[2], device=rank.device) < per_row(counts, rank.device)
    return Picked(slots, exist)


def last_row(
    entries: KeptLayer, look: Look, step: Step
) -> tuple[Float[Tensor, "batch heads 1 dim"], Float[Tensor, "batch kv group slots"]]:
    """The last real token's query, of the chunk in each row, and its attention over the entries."""
    query = look.query[:, :, -1:]
    if not step.ends_real:
        assert step.positions is not None
        last = step.positions.argmax(dim=1)[:, None, None, None].expand_as(query)
        query = look.query.gather(2, last)
    reading = Reading(((query, entries.keys),), entries.values, readable(entries, look, step))
    return query, reading.weights(look).squeeze(3)
