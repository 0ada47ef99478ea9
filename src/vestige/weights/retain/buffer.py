"""A store of examples that is small and fair: each example seen has the same chance to be in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vestige.errors import InputError
from vestige.weights.retain.session import Session

__all__ = ["Buffer", "Drawn", "Selection"]

Selection = Literal["reservoir", "class-balanced", "experience-balanced"]


@dataclass(frozen=True)
class Drawn:
    """Rows from a buffer: what the model takes, the experience of each (batch,), and what was kept beside them."""

    batch: dict[str, Tensor]
    tasks: Tensor
    extra: Tensor | None


class Buffer:
    """Examples of a stream, as many as fit.

    Each gets a random key, and the largest keys stay (Vitter, 1985, in the form of Efraimidis and Spirakis with equal
    weights). Balanced, the smallest key of the class (or experience) with the most examples goes, so that numbers per
    class differ by at most one wherever enough was seen.

    Args:
        size: examples that it holds at most.
        selection: see above.
    """

    def __init__(self, size: int, selection: Selection = "reservoir") -> None:
        self.size, self.selection = size, selection
        self.examples: list[dict[str, Tensor]] = []
        self.keys: list[float] = []
        self.groups: list[int] = []
        self.tasks: list[int] = []

    def __len__(self) -> int:
        return len(self.examples)

    def insert(self, session: Session, index: int, task: int, extra: Tensor | None = None) -> None:
        """Offer one row of the stream.

        Args:
            session: whose generator draws the key.
            index: the row.
            task: its experience.
            extra: what to keep beside the row.

        Raises:
            InputError: classes are to be balanced, and the row has no class.
        """
        key = float(torch.rand((), generator=session.generator, dtype=torch.float64))
        if self.selection == "reservoir" and len(self) == self.size and key < min(self.keys):
            return
        row = {name: value.clone() for name, value in session.example(task, index).items()}
        if extra is not None:
            row["extra"] = extra.detach().cpu().clone()
        self.examples.append(row)
        self.keys.append(key)
        self.tasks.append(task)
        self.groups.append(self._group(row, task))
        if len(self) > self.size:
            self._drop()

    def _group(self, row: dict[str, Tensor], task: int) -> int:
        if self.selection == "class-balanced":
            label = row.get("labels")
            if label is None or label.ndim:
                raise InputError("class-balanced needs one label per row; choose reservoir or experience-balanced")
            return int(label)
        return task if self.selection == "experience-balanced" else 0

    def _drop(self) -> None:
        counts = Counter(self.groups)
        largest = max(counts.values())
        candidates = [n for n, group in enumerate(self.groups) if counts[group] == largest]
        worst = min(candidates, key=lambda n: self.keys[n])
        for held in (self.examples, self.keys, self.groups, self.tasks):
            del held[worst]

    def draw(self, session: Session, count: int) -> Drawn:
        """Different rows at random, ``count`` or all that there are."""
        chosen = torch.randperm(len(self), generator=session.generator)[:count].tolist()
        rows: list[dict[str, Any]] = [
            {name: value for name, value in self.examples[n].items() if name != "extra"} for n in chosen
        ]
        extra = [self.examples[n]["extra"] for n in chosen if "extra" in self.examples[n]]
        batch = session.batch(rows)
        tasks = torch.tensor([self.tasks[n] for n in chosen])
        return Drawn(batch, tasks, torch.stack(extra).to(session.device) if extra else None)

    def tensors(self) -> dict[str, Tensor]:
        """The content by names."""
        own = {f"{n}.{name}": value for n, row in enumerate(self.examples) for name, value in row.items()}
        return {
            **own,
            "keys": torch.tensor(self.keys, dtype=torch.float64),
            "groups": torch.tensor(self.groups, dtype=torch.long),
            "tasks": torch.tensor(self.tasks, dtype=torch.long),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`tensors` gave."""
        self.keys, self.groups, self.tasks = (tensors[name].tolist() for name in ("keys", "groups", "tasks"))
        self.examples = [{} for _ in self.keys]
        for name, value in tensors.items():
            place, _, field = name.partition(".")
            if field:
                self.examples[int(place)][field] = value.cpu()
