"""Recall of many pairs in one row."""

from __future__ import annotations

import torch

from vestige.core.spec import param
from vestige.errors import SpecError
from vestige.evidence.tasks.recall import shuffled, write_pairs
from vestige.evidence.tasks.task import IGNORE, Batch, TrainingTask

__all__ = ["MQAR"]


class MQAR(TrainingTask):
    """Say, whenever a key comes again, the value that followed it at the beginning (multi-query associative recall).

    A row begins with pairs of a key and a value, a token each; every key then comes once more, somewhere in the rest,
    and its value is due after it. All else is blank. Token 0 is the blank, then come the keys, then the values.
    Source: Arora et al. (arXiv 2312.04927), section 3.1 and appendix: places crowd behind the pairs by a power law.
    """

    name = "mqar"
    version = 1

    pairs: int = param(8, "pairs in a row", ge=1)
    keys: int = param(64, "keys to draw from", ge=1)
    values: int = param(64, "values to draw from", ge=2)
    skew: float = param(0.99, "how questions crowd behind the pairs: the d-th place has the weight d^-skew", ge=0)

    def check(self) -> None:
        if self.pairs > self.keys:
            raise SpecError(f"{self.name}: parameter 'pairs' is {self.pairs}; allowed: 1 to 'keys', {self.keys}")
        self.check_room(3 * self.pairs)

    @property
    def chance(self) -> float:
        return 1 / self.values

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        keys, values = write_pairs(rows, generator, pairs=self.pairs, keys=self.keys, values=self.values)
        keys, values = 1 + keys, 1 + self.keys + values
        room, device = self.length - 2 * self.pairs, generator.device
        # The highest of these sums are a draw without replacement by the weights.
        weight = -self.skew * torch.arange(1, room + 1, device=device).log()
        noise = -torch.rand(rows, room, generator=generator, device=device).clamp_min(1e-20).log()
        places = (weight - noise.log()).topk(self.pairs, dim=1).indices
        places = places.gather(1, shuffled(rows, self.pairs, generator))
        asked = torch.zeros(rows, room, dtype=torch.long, device=device).scatter(1, places, keys)
        due = torch.full((rows, room), IGNORE, device=device).scatter(1, places, values)
        said = torch.stack([keys, values], 2).flatten(1)
        return Batch(torch.cat([said, asked], 1), torch.cat([torch.full_like(said, IGNORE), due], 1))
