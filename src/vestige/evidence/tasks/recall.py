"""Recall from a list of pairs: the smallest task that a memory can be good or bad at.

A row is a list of pairs, each a key with the value that it has from then on, one pair per token; then a key is asked
for and its last value is the answer. Everything that does not look back answers at chance. Keys may be written anew,
noise may stand between, and all may be declared void halfway: what counts is then what was said after that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.errors import SpecError

__all__ = ["NOTHING", "PairRecall", "Pairs", "shuffled", "write_pairs"]

NOTHING = -1
"""A token that is no key, or no value."""


@dataclass(frozen=True)
class Pairs:
    """Rows of the task.

    Attributes:
        key, value: ``(rows, length)`` what each token says; :data:`NOTHING` where it says no such thing. The token that
            declares all void has the key ``PairRecall.keys``.
        answer: ``(rows,)`` value of the key that the last token asks for; ``PairRecall.values`` where it has none.
    """

    key: Int[Tensor, "rows length"]
    value: Int[Tensor, "rows length"]
    answer: Int[Tensor, " rows"]


@dataclass(frozen=True, kw_only=True)
class PairRecall:
    """The task. Rows are drawn from a generator, so a seed gives the same rows everywhere.

    Attributes:
        pairs: different keys in a row.
        rewritten: how many of them are given a new value after all have been given one; one of these is asked for.
        void: how many of the pairs are then declared void; half of the questions are for one of these.
        keys, values: how many there are to draw from.
        noise: tokens that say nothing, in random places before the question.
    """

    pairs: int = 4
    rewritten: int = 0
    void: int = 0
    keys: int = 8
    values: int = 8
    noise: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise SpecError(f"recall: pairs is {self.pairs}; allowed: 1 to the number of keys, {self.keys}")
        if not 0 <= self.rewritten <= self.pairs:
            raise SpecError(f"recall: rewritten is {self.rewritten}; allowed: 0 to the number of pairs, {self.pairs}")
        if not 0 <= self.void < self.pairs or (self.void and self.rewritten):
            raise SpecError(f"recall: void is {self.void}; allowed: fewer than the pairs, and with rewritten none")
        if self.values < 2 or self.noise < 0:
            raise SpecError(f"recall: values is {self.values}, noise {self.noise}; allowed: >= 2, >= 0")

    @property
    def length(self) -> int:
        """Tokens per row, the question included."""
        return self.pairs + self.rewritten + bool(self.void) + self.noise + 1

    @property
    def chance(self) -> float:
        """Share of right answers without looking back: one value's, or that of saying that there is none."""
        return 0.5 if self.void else 1 / self.values

    def draw(self, rows: int, generator: torch.Generator) -> Pairs:
        """Rows of the task."""
        counts = {"pairs": self.pairs, "rewritten": self.rewritten, "keys": self.keys, "values": self.values}
        said, values = write_pairs(rows, generator, **counts)
        if self.void:  # half of the questions go to what is void by then
            old = torch.randint(self.void, (rows, 1), generator=generator)
            new = torch.randint(self.void, self.pairs, (rows, 1), generator=generator)
            asked = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, old, new)
        else:
            first = self.pairs if self.rewritten else 0
            asked = torch.randint(first, said.shape[1], (rows, 1), generator=generator)
        question = said.gather(1, asked)
        answer = values.gather(1, asked).masked_fill(asked < self.void, self.values)
        if self.void:
            mark = torch.full((rows, 1), self.keys), torch.full((rows, 1), NOTHING)
            said, values = (
                torch.cat([t[:, : self.void], extra, t[:, self.void :]], 1)
                for t, extra in zip((said, values), mark, strict=True)
            )
        spots = shuffled(rows, self.length - 1, generator)[:, : said.shape[1]].sort(1).values
        key = torch.full((rows, self.length), NOTHING).scatter(1, spots, said)
        value = torch.full((rows, self.length), NOTHING).scatter(1, spots, values)
        key[:, -1:] = question
        return Pairs(key, value, answer[:, 0])


def write_pairs(
    rows: int, generator: torch.Generator, *, pairs: int, rewritten: int = 0, keys: int, values: int
) -> tuple[Int[Tensor, "rows written"], Int[Tensor, "rows written"]]:
    """Keys, each of the ``pairs`` once and then ``rewritten`` of them again, and a value for each writing."""
    order = shuffled(rows, keys, generator)[:, :pairs]
    again = order.gather(1, shuffled(rows, pairs, generator)[:, :rewritten])
    said = torch.cat([order, again], 1)
    return said, torch.randint(values, said.shape, generator=generator, device=generator.device)


def shuffled(rows: int, count: int, generator: torch.Generator) -> Int[Tensor, "rows count"]:
    """The numbers below ``count`` in a random order for each row."""
    return torch.rand(rows, count, generator=generator, device=generator.device).argsort(1)
