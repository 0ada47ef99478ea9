"""From what is compared to cells, and from cells to jobs that one reading serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vestige.context.policy import CachePolicy
from vestige.core.method import Method
from vestige.errors import SpecError
from vestige.evidence.amounts import Amount
from vestige.evidence.budgets import at, evicts, label
from vestige.evidence.compare.spec import Comparison
from vestige.evidence.engine.reading import reading_groups
from vestige.evidence.engine.record import cell_key
from vestige.evidence.tasks.task import ContextTask

__all__ = ["Cell", "Facts", "Job", "Way", "cells_of", "check_limits", "jobs_of"]

QUESTION_TOKENS = 40  # of one question, as counted in estimates of time
DECODED_TOKEN = 12  # prompt tokens that take as long as one decoded token, for the same estimates


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is to be known of a model before anything is measured.

    Attributes:
        given: what all its measurements depend on: weights, dtype, device, version.
        max_positions: tokens that it reads at most.
        cache_bytes_per_token: of the full cache.
        seconds_per_token: of reading, as seen on a short text.
    """

    given: Mapping[str, str]
    max_positions: int
    cache_bytes_per_token: int
    seconds_per_token: float


@dataclass(frozen=True, kw_only=True)
class Way:
    """How cells are measured: what is the same for all cells of a comparison."""

    equal: str
    examples: int
    batch: int
    question_known: bool
    timed: int
    device: str
    dtype: str

    @classmethod
    def of(cls, chosen: Comparison) -> Way:
        return cls(**{name: getattr(chosen, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: a method under a budget, on a task, with a model and a seed.

    Attributes:
        model: its name.
        task, method: as they are compared, the method without the budget.
        budget: what it may use; ``None`` for a method that has no budget to set.
        seed: of the examples.
        key: of its row.
    """

    model: str
    task: ContextTask
    method: CachePolicy
    budget: Amount | None
    seed: int
    key: str = field(default="", compare=False)

    def keyed(self, way: Way, given: Mapping[str, str]) -> Cell:
        """The cell with the key that all it depends on gives."""
        key = cell_key(
            "compare",
            **given,
            method=self.method.spec(),
            budget=None if self.budget is None else [self.budget.value, self.budget.unit],
            equal=None if self.budget is None else way.equal,
            task=self.task.spec(),
            seed=self.seed,
            examples=way.examples,
            question_known=way.question_known,
        )
        return replace(self, key=key)

    def described(self, way: Way, given: Mapping[str, str]) -> dict[str, Any]:
        """The cell as plain JSON types: enough to measure it again."""
        return {
            "model": self.model,
            "label": label(self.method),
            "task_label": label(self.task),
            "task": self.task.spec(),
            "method": self.method.spec(),
            "budget": None if self.budget is None else [self.budget.value, self.budget.unit],
            "seed": self.seed,
            **vars(way),
            "given": dict(given),
        }

    @classmethod
    def read(cls, told: Mapping[str, Any], key: str = "") -> tuple[Cell, Way]:
        """A cell from its description.

        Raises:
            SpecError: a method or task of it is unknown here, or of another version.
        """
        budget = None if told["budget"] is None else Amount(*told["budget"])
        method, task = CachePolicy.from_spec(told["method"]), ContextTask.from_spec(told["task"])
        assert isinstance(method, CachePolicy) and isinstance(task, ContextTask)
        cell = cls(model=told["model"], task=task, method=method, budget=budget, seed=told["seed"], key=key)
        return cell, Way(**{name: told[name] for name in Way.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Job:
    """Cells of one model, task and seed, whose methods read the context together."""

    cells: tuple[Cell, ...]
    way: Way

    @property
    def model(self) -> str:
        """The model's name."""
        return self.cells[0].model

    @property
    def work(self) -> float:
        """What there is to do, in tokens read."""
        task = self.cells[0].task
        timed = task.length + DECODED_TOKEN * self.way.timed if self.way.timed else 0
        asked = QUESTION_TOKENS * self.way.examples + timed
        return float(task.length * self.way.examples + len(self.cells) * asked)

    @property
    def says(self) -> str:
        """What is done, for the progress bar."""
        cell, methods = self.cells[0], {cell.method.name for cell in self.cells}
        who = next(iter(methods)) if len(methods) == 1 else f"{len(methods)} methods"
        return f"{cell.task.name}, seed {cell.seed}, {who}"


def cells_of(chosen: Comparison, names: Iterable[str]) -> list[Cell]:
    """All cells of a comparison, without keys: model by model, task by task, seed by seed."""
    return [
        Cell(model=model, task=task, method=method, budget=budget, seed=seed)
        for model in names
        for task in chosen.tasks
        for seed in chosen.seeds
        for given in chosen.methods
        for method, budgets in [_budgeted(given, chosen)]
        for budget in budgets
    ]


def _budgeted(method: CachePolicy, chosen: Comparison) -> tuple[CachePolicy, tuple[Amount | None, ...]]:
    """The method without a budget of its own, and the budgets that it is measured at."""
    if evicts(method):
        return at(method, 1.0), chosen.budgets
    if reads_under_budget(method) and chosen.equal != "bytes":
        return method, chosen.budgets
    return method, (None,)


def reads_under_budget(method: Method) -> bool:
    """Whether a method keeps every entry and has a budget of those that it reads: it saves time and no bytes."""
    return not evicts(method) and method.name != "full" and "budget" in method.parameters()  # type: ignore[arg-type]


def jobs_of(cells: Iterable[Cell], way: Way, timed_seed: int) -> list[Job]:
    """The cells in jobs: those of one model, task and seed whose methods can read together.

    Time is measured with one seed only, the first: it is the same for all examples.
    """
    together: dict[Any, list[Cell]] = {}
    for cell in cells:
        together.setdefault((cell.model, cell.task, cell.seed), []).append(cell)
    jobs = []
    for group in together.values():
        own = way if group[0].seed == timed_seed else replace(way, timed=0)
        for methods in reading_groups(dict.fromkeys(cell.method for cell in group)):
            jobs.append(Job(cells=tuple(cell for cell in group if cell.method in methods), way=own))
    return jobs


def check_limits(chosen: Comparison, model: str, facts: Facts) -> None:
    """Raise where a task or a budget is beyond the model.

    Raises:
        SpecError: a context or a budget is larger than what the model reads.
    """
    for task in chosen.tasks:
        if task.length > facts.max_positions:
            raise SpecError(
                f"task {label(task)}: parameter 'length' is {task.length}; {model} reads {facts.max_positions} tokens "
                "at most"
            )
    limits = {"entries": facts.max_positions, "bytes": facts.max_positions * facts.cache_bytes_per_token}
    for budget in chosen.budgets:
        if budget.value > limits.get(budget.unit, float("inf")):
            most = Amount(limits[budget.unit], budget.unit)
            raise SpecError(
                f"budget {budget} is larger than the full cache of {model} at its limit of {facts.max_positions:,} "
                f"tokens: {most}"
            )
