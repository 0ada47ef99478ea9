"""Recall of what was said last."""

from __future__ import annotations

import torch

from vestige.core.spec import param
from vestige.errors import SpecError
from vestige.evidence.tasks.recall import shuffled, write_pairs
from vestige.evidence.tasks.task import IGNORE, Batch, TrainingTask

__all__ = ["LastWriteWins"]


class LastWriteWins(TrainingTask):
    """Say the last of the values that each key was given: earlier ones must be forgotten.

    A row is a list of writings, a key and a value each, in which every key comes at least once and most come again;
    at the end each key stands once more, and its latest value is due. Token 0 is the blank in front, then come the
    keys, then the values. A memory that only adds up answers with a mixture of all values that a key has had.
    """

    name = "last-write-wins"
    version = 1

    pairs: int = param(4, "keys in a row", ge=1)
    writes: int = param(16, "writings in a row", ge=1)
    keys: int = param(16, "keys to draw from", ge=1)
    values: int = param(16, "values to draw from", ge=2)

    def check(self) -> None:
        if self.pairs > self.keys:
            raise SpecError(f"{self.name}: parameter 'pairs' is {self.pairs}; allowed: 1 to 'keys', {self.keys}")
        if self.writes < self.pairs:
            raise SpecError(f"{self.name}: parameter 'writes' is {self.writes}; allowed: int >= 'pairs', {self.pairs}")
        self.check_room(2 * self.writes + self.pairs)

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        counts = {"pairs": self.pairs, "keys": self.keys, "values": self.values}
        own, first = write_pairs(rows, generator, **counts)
        again = torch.randint(self.pairs, (rows, self.writes - self.pairs), generator=generator)
        said = torch.cat([own, own.gather(1, again)], 1)
        values = torch.cat([first, torch.randint(self.values, again.shape, generator=generator)], 1)
        order = shuffled(rows, self.writes, generator)
        said, values = said.gather(1, order), values.gather(1, order)
        asked = own.gather(1, shuffled(rows, self.pairs, generator))
        # Of the writings of a key the one that stands last.
        same = asked[:, :, None] == said[:, None, :]
        last = (same * torch.arange(1, self.writes + 1)).argmax(2)
        written = torch.stack([1 + said, 1 + self.keys + values], 2).flatten(1)
        blank = torch.zeros(rows, self.length - 2 * self.writes - self.pairs, dtype=torch.long)
        tokens = torch.cat([blank, written, 1 + asked], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.pairs :] = 1 + self.keys + values.gather(1, last)
        return Batch(tokens, targets)
