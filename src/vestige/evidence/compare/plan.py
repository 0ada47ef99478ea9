"""What a comparison comes to, whatever it compares: cells, and jobs of cells that are measured together."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from vestige.core.method import Method
from vestige.evidence.budgets import label
from vestige.evidence.engine.bench import device_name

if TYPE_CHECKING:
    from vestige.evidence.tasks.task import Task, TaskScore

__all__ = ["Ask", "Cell", "Job", "Plan", "Trainer", "scored"]

TRACE = 1500  # characters of a traceback, its end, that go into the row of a cell that failed


class Ask(Protocol):
    """Calls a method of one worker."""

    def __call__(self, method: str, *arguments: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: a method on a task, with a model and a seed. Each kind of comparison adds what else it is.

    Attributes:
        model: its name.
        task: what is asked.
        method: what is compared.
        seed: of everything that is drawn.
        given: what all measurements of the model depend on: weights, device, version.
        key: of its row.
    """

    model: str
    task: Task
    method: Method
    seed: int
    given: Mapping[str, str] = field(default_factory=dict, compare=False)
    key: str = field(default="", compare=False)

    def described(self) -> dict[str, Any]:
        """The cell as plain JSON types: enough to measure it again."""
        return {
            "model": self.model,
            "label": label(self.method),
            "task_label": label(self.task),
            "task": self.task.spec(),
            "method": self.method.spec(),
            "budget": None,
            "seed": self.seed,
            "given": dict(self.given),
            **self.how(),
        }

    def how(self) -> dict[str, Any]:
        """What the kind of comparison adds to that."""
        raise NotImplementedError

    def asked(self) -> dict[str, Any] | None:
        """The budget as it was asked for; ``None`` where there is none."""
        return None

    def row(self, **more: Any) -> dict[str, Any]:
        """The cell's row of the ledger."""
        return {
            "study": "compare",
            "key": self.key,
            "model": self.model,
            "task": self.task.spec(),
            "seed": self.seed,
            "cell": self.described(),
            "method": self.method.spec(),
            "budget": self.asked(),
            **more,
        }

    def failed(self, error: Exception) -> dict[str, Any]:
        """The row of a cell that could not be measured."""
        trace = "".join(traceback.format_exception(error))[-TRACE:]
        return self.row(error={"type": type(error).__name__, "text": str(error), "trace": trace})

    def on(self, given: Mapping[str, str]) -> Self:
        """The cell, measured with these weights, on this device."""
        return replace(self, given=dict(given))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells that are measured together.

    Attributes:
        cells: at least one, with one task, model and seed.
        seconds: about, that they take.
    """

    cells: tuple[Any, ...]
    seconds: float = 0.0

    @property
    def says(self) -> str:
        """What is done, for the progress bar."""
        cell, methods = self.cells[0], {cell.method.name for cell in self.cells}
        who = next(iter(methods)) if len(methods) == 1 else f"{len(methods)} methods"
        return f"{cell.task.name}, seed {cell.seed}, {who}"


class Trainer:
    """A worker that trains models of its own."""

    def given(self, device: str) -> dict[str, str]:
        """What all measurements depend on beside their cells.

        Raises:
            SpecError: this machine has no such device.
        """
        import vestige
        from vestige.models.hub import find_device

        place = find_device(device)
        assert place is not None
        return {"vestige": vestige.__version__, "device": device_name(place)}

    def run(self, job: Job) -> list[dict[str, Any]]:
        """The rows of a job's cells. One that fails has a row with its error, and the others are measured."""
        rows = []
        for cell in job.cells:
            try:
                rows.append(self._measure(cell))
            except Exception as error:
                rows.append(cell.failed(error))
        return rows

    def _measure(self, cell: Any) -> dict[str, Any]:
        """The row of a cell."""
        raise NotImplementedError


def scored(task: Task, score: TaskScore) -> dict[str, Any]:
    """What a row says of its examples."""
    return {
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        "chance": task.chance,
        "ceiling": task.ceiling,
        "values": list(score.values),
    }


class Plan(Protocol):
    """A comparison whose models have been looked at.

    Attributes:
        cells: all of them, with their keys.
    """

    cells: list[Any]

    def jobs(self, missing: list[Any]) -> list[Any]:
        """The cells that are to be measured, in jobs."""
