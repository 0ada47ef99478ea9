"""Copying what counts, and nothing else."""

from __future__ import annotations

import torch

from vestige.core.spec import param
from vestige.evidence.tasks.recall import shuffled
from vestige.evidence.tasks.task import IGNORE, Batch, TrainingTask

__all__ = ["SelectiveCopying"]


class SelectiveCopying(TrainingTask):
    """Repeat, in their order, the symbols that stood between blanks.

    Symbols stand in random places of a row of blanks; at the end comes a mark for each of them, after which it is
    due. The gaps vary, so copying from a fixed distance does not do. Token 0 is the blank, 1 the mark, then come the
    symbols. Source: Gu and Dao (arXiv 2312.00752), section 3.1.
    """

    name = "selective-copying"
    version = 1

    items: int = param(8, "symbols in a row", ge=1)
    symbols: int = param(16, "symbols to draw from", ge=2)

    def check(self) -> None:
        self.check_room(2 * self.items)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def vocabulary(self) -> int:
        return 2 + self.symbols

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        items = 2 + torch.randint(self.symbols, (rows, self.items), generator=generator)
        room = self.length - self.items
        places = shuffled(rows, room, generator)[:, : self.items].sort(1).values
        tokens = torch.ones(rows, self.length, dtype=torch.long)
        tokens[:, :room] = torch.zeros(rows, room, dtype=torch.long).scatter(1, places, items)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, room:] = items
        return Batch(tokens, targets)
