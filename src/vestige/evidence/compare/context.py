"""Cache policies under budgets, on tasks that read a context and then answer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pydantic

from vestige.context.evict.full import Full
from vestige.context.policy import CachePolicy
from vestige.core.method import Method
from vestige.errors import ModelError, SpecError
from vestige.evidence.amounts import Amount, Unit
from vestige.evidence.budgets import at, evicts, label
from vestige.evidence.compare.plan import Ask, Cell, Job
from vestige.evidence.compare.spec import Comparison, Lines, PlacedError
from vestige.evidence.engine.bench import load_pair
from vestige.evidence.engine.reading import reading_groups
from vestige.evidence.engine.record import cell_key
from vestige.evidence.tasks.task import ContextTask, Task

__all__ = ["ContextCell", "ContextComparison", "ContextJob", "Facts", "Way"]

QUESTION_TOKENS = 40  # of one question, as counted in estimates of time
DECODED_TOKEN = 12  # prompt tokens that take as long as one decoded token, for the same estimates

Equal = Literal["bytes", "entries", "time"]
UNITS: dict[str, tuple[Unit, ...]] = {
    "bytes": ("share", "bytes"),
    "entries": ("share", "entries"),
    "time": ("share", "seconds"),
}


class ContextComparison(Comparison):
    """Methods x budgets x tasks x models x seeds: what is left of a context in a cache.

    Attributes:
        models: what :func:`vestige.models.load` takes; from Python also pairs of a model and its tokenizer.
        tasks: tasks that read a context, by name or spec.
        methods: cache policies, by name or spec; ``full`` is always among them, as the measure of the others.
        budgets: what a method may use: shares (``0.25``) of what the full cache takes, or amounts (see ``equal``).
        equal: what the methods get equal amounts of: ``bytes`` held per context (a budget is a share, or ``"4MB"``),
            ``entries`` per head (a share, or a whole number), or ``time`` per decoded token (a share, or ``"5ms"``).
            Each method's own parameter is worked out from that. One that has none runs once, as it stands.
        examples: per task and seed.
        batch: examples that run together.
        question_known: whether a method sees the question before it drops anything.
        timed: tokens that are decoded to measure seconds per token; 0 measures no time.
        device: see :func:`vestige.models.load`.
        dtype: see :func:`vestige.models.load`.
    """

    family: ClassVar[type[Task]] = ContextTask
    about: ClassVar[str] = "tasks that read a context"

    models: tuple[Any, ...] = pydantic.Field(min_length=1)
    tasks: tuple[ContextTask, ...] = pydantic.Field(min_length=1)
    methods: tuple[CachePolicy, ...] = pydantic.Field(min_length=1)
    budgets: tuple[Amount, ...] = (Amount(0.25, "share"), Amount(0.5, "share"))
    equal: Equal = "bytes"
    examples: int = pydantic.Field(5, ge=1)
    batch: int = pydantic.Field(5, ge=1)
    question_known: bool = False
    timed: int = pydantic.Field(8, ge=0)
    dtype: str = "auto"

    @pydantic.field_validator("budgets", mode="before")
    @classmethod
    def _amounts(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple | range)
        return tuple(Amount.of(item) for item in (value if several else (value,)))

    @pydantic.field_validator("models")
    @classmethod
    def _names(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        for item in value:
            if not (isinstance(item, str | os.PathLike) or _is_pair(item)):
                raise SpecError(f"{item!r} is no model; allowed: a name, a folder, or (model, tokenizer)")
        return value

    @pydantic.field_validator("methods")
    @classmethod
    def _with_full(cls, value: tuple[CachePolicy, ...]) -> tuple[CachePolicy, ...]:
        """The full cache first, and each method once."""
        return tuple({label(policy): policy for policy in (Full(), *value)}.values())

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ContextComparison:
        for place, budget in enumerate(self.budgets):
            if budget.unit not in UNITS[self.equal]:
                raise PlacedError(
                    ("budgets", place),
                    f"budget {budget} in a comparison at equal {self.equal}; "
                    f"allowed: {' or '.join(UNITS[self.equal])} (a share is a number with a decimal point)",
                )
        if len(set(self.budgets)) < len(self.budgets):
            raise PlacedError(("budgets",), "field 'budgets' holds the same value twice")
        if self.equal == "time" and self.timed < 1:
            raise PlacedError(("timed",), "field 'timed' is 0; a comparison at equal time has to decode some tokens")
        return self

    @classmethod
    def several(cls, name: str, value: Any) -> bool:
        return super().several(name, value) and not (name == "models" and _is_pair(value))

    @property
    def pairs(self) -> dict[str, tuple[Any, Any]]:
        """Models that were given as objects, by name."""
        return {load_pair(model, None, None)[0]: model for model in self.models if isinstance(model, tuple)}

    def worker(self) -> Callable[[], Any]:
        from vestige.evidence.compare.work import Worker

        return functools.partial(Worker, self.pairs) if self.pairs else Worker

    def plan(self, ask: Ask, lines: Lines) -> ContextPlan:
        names = [load_pair(m, None, None)[0] if isinstance(m, tuple) else os.fspath(m) for m in self.models]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"field 'models' holds {name!r} twice")
        facts = {}
        for name in names:
            try:
                facts[name] = ask("facts", name, self.dtype, self.device)
            except ModelError as error:
                raise SpecError(f"{lines.of_value('models', name)}{error}") from error
            _check_limits(self, name, facts[name], lines)
        return ContextPlan(self, facts)

    @classmethod
    def again(cls, told: Mapping[str, Any], key: str) -> dict[str, Any]:
        from vestige.evidence.compare.work import Worker

        cell, worker = _read(told, key), Worker()
        known = worker.facts(cell.model, cell.way.dtype, cell.way.device).given
        if cell.given and known["weights"] != cell.given["weights"]:
            raise SpecError(f"{cell.model} has other weights now than in the row {key!r}")
        return worker.run(ContextJob(cells=(cell,)))[0]


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
    def of(cls, chosen: ContextComparison) -> Way:
        return cls(**{name: getattr(chosen, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class ContextCell(Cell):
    """A policy under a budget, on a task, with a model and a seed.

    Attributes:
        task: what is read and asked.
        method: the policy without the budget.
        budget: what it may use; ``None`` for a method that has no budget to set.
        way: how it is measured.
    """

    task: ContextTask
    method: CachePolicy
    budget: Amount | None
    way: Way

    def keyed(self, given: Mapping[str, str]) -> ContextCell:
        """The cell with the key that all it depends on gives."""
        key = cell_key(
            "compare",
            **given,
            method=self.method.spec(),
            budget=None if self.budget is None else [self.budget.value, self.budget.unit],
            equal=None if self.budget is None else self.way.equal,
            task=self.task.spec(),
            seed=self.seed,
            examples=self.way.examples,
            question_known=self.way.question_known,
        )
        return replace(self, key=key, given=given)

    def how(self) -> dict[str, Any]:
        budget = None if self.budget is None else [self.budget.value, self.budget.unit]
        return {"budget": budget, **vars(self.way)}

    def asked(self) -> dict[str, Any] | None:
        return None if self.budget is None else {"asked": str(self.budget), "equal": self.way.equal}


@dataclass(frozen=True, kw_only=True)
class ContextJob(Job):
    """Cells, all with one way, whose methods read the context together."""

    cells: tuple[ContextCell, ...]

    @property
    def way(self) -> Way:
        """How they are measured."""
        return self.cells[0].way

    @property
    def work(self) -> float:
        """What there is to do, in tokens read."""
        task = self.cells[0].task
        timed = task.length + DECODED_TOKEN * self.way.timed if self.way.timed else 0
        asked = QUESTION_TOKENS * self.way.examples + timed
        return float(task.length * self.way.examples + len(self.cells) * asked)


class ContextPlan:
    """Cells model by model, task by task, seed by seed; jobs that share readings."""

    def __init__(self, chosen: ContextComparison, facts: Mapping[str, Facts]) -> None:
        self.chosen, self.facts = chosen, facts
        way = Way.of(chosen)
        self.cells = [
            ContextCell(model=name, task=task, method=method, budget=budget, seed=seed, way=way).keyed(known.given)
            for name, known in facts.items()
            for task in chosen.tasks
            for seed in chosen.seeds
            for given in chosen.methods
            for method, budgets in [_budgeted(given, chosen)]
            for budget in budgets
        ]

    def jobs(self, missing: Iterable[ContextCell]) -> list[ContextJob]:
        """The cells in jobs: those of one model, task and seed whose methods can read together.

        Time is measured with one seed only, the first: it is the same for all examples.
        """
        together: dict[Any, list[ContextCell]] = {}
        for cell in missing:
            together.setdefault((cell.model, cell.task, cell.seed), []).append(cell)
        jobs = []
        for group in together.values():
            if group[0].seed != self.chosen.seeds[0]:
                group = [replace(cell, way=replace(cell.way, timed=0)) for cell in group]
            for methods in reading_groups(dict.fromkeys(cell.method for cell in group)):
                job = ContextJob(cells=tuple(cell for cell in group if cell.method in methods))
                jobs.append(replace(job, seconds=job.work * self.facts[group[0].model].seconds_per_token))
        return jobs


def _read(told: Mapping[str, Any], key: str) -> ContextCell:
    """A cell from its description."""
    method, task = CachePolicy.from_spec(told["method"]), ContextTask.from_spec(told["task"])
    assert isinstance(method, CachePolicy) and isinstance(task, ContextTask)
    return ContextCell(
        model=told["model"],
        task=task,
        method=method,
        budget=None if told["budget"] is None else Amount(*told["budget"]),
        seed=told["seed"],
        way=Way(**{name: told[name] for name in Way.__dataclass_fields__}),
        given=told["given"],
        key=key,
    )


def _budgeted(method: CachePolicy, chosen: ContextComparison) -> tuple[CachePolicy, tuple[Amount | None, ...]]:
    """The method without a budget of its own, and the budgets that it is measured at."""
    if evicts(method):
        return at(method, 1.0), chosen.budgets
    if reads_under_budget(method) and chosen.equal != "bytes":
        return method, chosen.budgets
    return method, (None,)


def reads_under_budget(method: Method) -> bool:
    """Whether a method keeps every entry and has a budget of those that it reads: it saves time and no bytes."""
    return not evicts(method) and method.name != "full" and "budget" in method.parameters()  # type: ignore[arg-type]


def _check_limits(chosen: ContextComparison, model: str, facts: Facts, lines: Lines) -> None:
    """Raise :class:`SpecError` where a context or a budget is larger than what the model reads."""
    for place, task in enumerate(chosen.tasks):
        if task.length > facts.max_positions:
            raise SpecError(
                f"{lines.place(('tasks', place, 'length'))}task {label(task)}: parameter 'length' is {task.length}; "
                f"{model} reads {facts.max_positions} tokens at most"
            )
    limits = {"entries": facts.max_positions, "bytes": facts.max_positions * facts.cache_bytes_per_token}
    for place, budget in enumerate(chosen.budgets):
        if budget.value > limits.get(budget.unit, float("inf")):
            most = Amount(limits[budget.unit], budget.unit)
            raise SpecError(
                f"{lines.place(('budgets', place))}budget {budget} is larger than the full cache of {model} at its "
                f"limit of {facts.max_positions:,} tokens: {most}"
            )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not any(isinstance(part, str) for part in value)
