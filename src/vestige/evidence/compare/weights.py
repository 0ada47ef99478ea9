"""Learners on streams, erasers on what is to be forgotten: every one begins with the same small model."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch

from vestige.core.method import Method
from vestige.errors import SpecError, VestigeError
from vestige.evidence.compare.plan import Ask, Cell, Job, Trainer, scored
from vestige.evidence.compare.spec import Comparison, Lines, PlacedError
from vestige.evidence.engine.record import cell_key
from vestige.evidence.runs.models import build, teach, tokenizer_of
from vestige.evidence.runs.retain import arguments, general_of, stream_of
from vestige.evidence.runs.sources import Examples, Row, chosen, encoded, examples
from vestige.evidence.runs.spec import Learning, Model
from vestige.evidence.tasks.erasure_split import ErasureSplit
from vestige.evidence.tasks.experience_stream import ExperienceStream
from vestige.evidence.tasks.task import Task
from vestige.evidence.tasks.weights import WeightsTask
from vestige.models.hub import find_device
from vestige.weights.erase.eraser import Eraser
from vestige.weights.erase.examples import Examples as Rows
from vestige.weights.erase.examples import Reader
from vestige.weights.erase.losses import row_accuracy
from vestige.weights.erase.retrain import Retrain
from vestige.weights.retain import ContinualTrainer, Learner

__all__ = ["ErasureComparison", "StreamComparison", "WeightsCell"]

PROBED = 64  # rows by which the time of all is estimated


class WeightsComparison(Comparison):
    """What comparisons of learners and of erasers have in common."""

    models: tuple[Model, ...] = pydantic.Field((Model(new={}),), min_length=1)
    learn: Learning = pydantic.Field(default_factory=lambda: Learning.model_validate({}))
    alone: ClassVar[bool]  # whether each method needs a job of its own
    works: ClassVar[type[Any]]  # the worker

    def plan(self, ask: Ask, lines: Lines) -> WeightsPlan:
        return WeightsPlan(self, ask)

    @classmethod
    def again(cls, told: Mapping[str, Any], key: str) -> dict[str, Any]:
        task, method = WeightsTask.from_spec(told["task"]), Method.from_spec(told["method"])
        assert isinstance(task, WeightsTask)
        parts: dict[str, Any] = {"start": Model(**told["start"]), "learn": Learning(**told["learn"])}
        same: dict[str, Any] = {name: told[name] for name in ("model", "seed", "device", "given")}
        cell = WeightsCell(task=task, method=method, key=key, **parts, **same)
        return cls.works().run(Job(cells=(cell,)))[0]

    def worker(self) -> Callable[[], Any]:
        return self.works


class StreamComparison(WeightsComparison):
    """Learners x streams x models x seeds: what is left of the old when the new has been learnt.

    Attributes:
        tasks: ``experience-stream``, by name or spec.
        methods: learners, by name or spec.
        models: what learns: ``{new: sizes}`` or ``{load: folder or id}``; see
            :class:`~vestige.evidence.runs.spec.Model`. Every learner begins with the weights that the seed draws.
        learn: ``epochs``, ``learning_rate`` and ``batch`` of each experience.
        seeds: of rows, weights and order.
        device: where to learn; ``"auto"`` is the accelerator if there is one.
    """

    family: ClassVar[type[Task]] = ExperienceStream
    about: ClassVar[str] = "streams to be learnt"
    alone: ClassVar[bool] = True

    tasks: tuple[ExperienceStream, ...] = pydantic.Field(min_length=1)
    methods: tuple[Learner, ...] = pydantic.Field(min_length=1)


class ErasureComparison(WeightsComparison):
    """Erasers x what is to be forgotten x models x seeds: how near to never having learnt it.

    Attributes:
        tasks: ``erasure-split``, by name or spec.
        methods: erasers of trained models, by name or spec.
        models: what learns and forgets; as of a comparison of learners.
        learn: ``epochs``, ``learning_rate`` and ``batch`` with which the model is taught everything, and another
            one all but what is to be forgotten.
        seeds: of rows, weights, order and erasure.
        device: where to work; ``"auto"`` is the accelerator if there is one.
    """

    family: ClassVar[type[Task]] = ErasureSplit
    about: ClassVar[str] = "examples to be forgotten"
    alone: ClassVar[bool] = False

    tasks: tuple[ErasureSplit, ...] = pydantic.Field(min_length=1)
    methods: tuple[Eraser, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _of_trained_models(self) -> ErasureComparison:
        for place, eraser in enumerate(self.methods):
            if isinstance(eraser, Retrain):
                raise PlacedError(("methods", place), f"{eraser.name} is what all are measured by; name other erasers")
        return self


@dataclass(frozen=True, kw_only=True)
class WeightsCell(Cell):
    """A learner or eraser on a task, with a model and a seed.

    Attributes:
        start: the model that is begun with; a new one's weights come from the cell's seed.
        learn: how it is taught.
        device: where.
    """

    task: WeightsTask
    start: Model
    learn: Learning
    device: str

    def keyed(self, given: Mapping[str, str]) -> WeightsCell:
        """The cell with the key that all it depends on gives."""
        what = {"method": self.method.spec(), "task": self.task.spec(), "seed": self.seed}
        how = {"start": self.start.model_dump(), "learn": self.learn.model_dump()}
        return replace(self, key=cell_key("compare", **given, **what, **how), given=given)

    def how(self) -> dict[str, Any]:
        return {"start": self.start.model_dump(), "learn": self.learn.model_dump(), "device": self.device}


class WeightsPlan:
    """Cells model by model, task by task, seed by seed; a job is a learner, or all erasers of a model, which is taught
    once for them."""

    def __init__(self, chosen: WeightsComparison, ask: Ask) -> None:
        self.chosen, self.ask = chosen, ask
        same: dict[str, Any] = {"learn": chosen.learn, "device": chosen.device}
        given = ask("given", chosen.device)
        self.cells = [
            WeightsCell(model=_called(start), task=task, method=method, seed=seed, start=start, **same).keyed(given)
            for start, task, method, seed in chosen.each()
        ]

    def jobs(self, missing: Iterable[WeightsCell]) -> list[Job]:
        """The cells in jobs. How long they take is seen on a few rows, once for each task and model."""
        together: dict[Any, list[WeightsCell]] = {}
        for cell in missing:
            own = cell.method if self.chosen.alone else None
            together.setdefault((cell.model, cell.task, cell.seed, own), []).append(cell)

        @functools.cache
        def seconds(model: str, task: WeightsTask) -> float:
            return float(self.ask("seconds", next(c for c in self.cells if (c.model, c.task) == (model, task))))

        jobs = [Job(cells=tuple(cells)) for cells in together.values()]
        return [replace(job, seconds=seconds(job.cells[0].model, job.cells[0].task)) for job in jobs]


class _Worker(Trainer):
    """What both kinds of workers do."""

    times: ClassVar[int]  # how often all examples are taught, for the estimate

    def seconds(self, cell: WeightsCell) -> float:
        """About how long teaching takes, seen on a few rows.

        Raises:
            SpecError: the examples or the model cannot be had.
        """
        try:
            found, tokenizer, model = self._begin(cell)
            self._parts(cell, found, tokenizer)
        except VestigeError as error:
            raise SpecError(str(error)) from error
        rows = list(found.train) if tokenizer is None else [encoded(tokenizer)(r, "question") for r in found.train]
        few = rows[:PROBED]
        teach(model, few[: cell.learn.batch], cell.learn.model_copy(update={"epochs": 1}))
        began = time.perf_counter()
        teach(model, few, cell.learn.model_copy(update={"epochs": 1}))
        per_row = (time.perf_counter() - began) / len(few)
        return self.times * cell.learn.epochs * len(rows) * per_row

    def _parts(self, cell: WeightsCell, found: Examples, tokenizer: Any) -> Any:
        """The examples in the parts in which the task has them.

        Raises:
            SpecError, InputError: the task does not fit the examples.
        """
        raise NotImplementedError

    def _begin(self, cell: WeightsCell) -> tuple[Examples, Any, Any]:
        found = examples(cell.task.source(cell.seed))
        start = cell.start.model_copy(update={"seed": cell.seed})
        tokenizer = tokenizer_of(start) if found.kind == "text" else None
        return found, tokenizer, build(start, found, tokenizer).to(find_device(cell.device))


class StreamWorker(_Worker):
    """Lets learners go through streams."""

    times = 1

    def _measure(self, cell: WeightsCell) -> dict[str, Any]:
        task, learner, how = cell.task, cell.method, cell.learn
        assert isinstance(task, ExperienceStream) and isinstance(learner, Learner)
        found, tokenizer, model = self._begin(cell)
        stream, collator = self._parts(cell, found, tokenizer)
        general = general_of(found, tokenizer)
        fields = {
            "num_train_epochs": how.epochs,
            "learning_rate": how.learning_rate,
            "per_device_train_batch_size": how.batch,
            "save_strategy": "no",
            "use_cpu": model.device.type == "cpu",
        }
        with tempfile.TemporaryDirectory() as folder:
            trainer = ContinualTrainer(
                model,
                learner,
                arguments(Path(folder), fields, cell.seed),
                collator=collator,
                general=general if learner.needs_general else None,
                held_out=general if found.kind == "text" else None,
            )
            run = trainer.run(stream)
        score = task.scored(run)
        return cell.row(
            metrics={score.metric: score.value, **run.metrics()},
            kv_bytes=run.replay_bytes + run.state_bytes,
            replay_bytes=run.replay_bytes,
            state_bytes=run.state_bytes,
            seconds=float(sum(run.seconds)),
            matrix=run.matrix.tolist(),
            names=list(run.names),
            unit=run.unit,
            scored=scored(task, score),
        )

    def _parts(self, cell: WeightsCell, found: Examples, tokenizer: Any) -> Any:
        assert isinstance(cell.task, ExperienceStream)
        return stream_of(found, cell.task.experiences, cell.task.kind, tokenizer)


class ErasureWorker(_Worker):
    """Teaches a model, makes copies of it forget, and compares them with one that never learnt."""

    times = 2
    _known: Any = None  # what the job's cells begin with

    def run(self, job: Job) -> list[dict[str, Any]]:
        """As others do; where the model cannot be taught, all rows have the error."""
        try:
            self._known = self._taught(job.cells[0])
        except Exception as error:
            return [cell.failed(error) for cell in job.cells]
        rows = super().run(job)
        self._known = None
        return rows

    def _taught(self, cell: WeightsCell) -> tuple[Any, dict[str, float], Any]:
        """The model that has learnt everything, the accuracies of one that has not, and the sets."""
        found, tokenizer, before = self._begin(cell)
        sets = self._parts(cell, found, tokenizer)
        how = cell.learn.model_copy(update={"seed": cell.seed})
        retrained = copy.deepcopy(before)
        teach(before, sets.learnt, how)
        teach(retrained, sets.retain, how)
        return before, _accuracies(retrained, sets, how.batch), sets

    def _measure(self, cell: WeightsCell) -> dict[str, Any]:
        before, retrained, sets = self._known
        model, eraser, batch = copy.deepcopy(before), cell.method, cell.learn.batch
        assert isinstance(eraser, Eraser) and isinstance(cell.task, ErasureSplit)
        trace = eraser.erase(model, forget=sets.forget, retain=sets.retain, batch_size=batch, seed=cell.seed)
        erased = _accuracies(model, sets, batch)
        score = cell.task.scored(erased, retrained)
        told = {f"{name}_accuracy": value for name, value in erased.items()}
        told |= {f"retrained_{name}_accuracy": value for name, value in retrained.items()}
        return cell.row(
            metrics={score.metric: score.value, **told},
            kv_bytes=0,
            seconds=trace.seconds,
            scored=scored(cell.task, score),
        )

    def _parts(self, cell: WeightsCell, found: Examples, tokenizer: Any) -> Any:
        assert isinstance(cell.task, ErasureSplit)
        encode = encoded(tokenizer) if tokenizer else lambda row, _: row
        return chosen(found, cell.task.forget, cell.seed, encode)


def _accuracies(model: Any, sets: Any, batch: int) -> dict[str, float]:
    """By set, of those that there are: to forget, to keep, and never taught."""
    named = {"forget": sets.forget, "retain": sets.retain, "unseen": sets.unseen}
    return {name: _accuracy(model, rows, batch) for name, rows in named.items() if rows}


@torch.no_grad()
def _accuracy(model: Any, rows: Sequence[Row], batch: int) -> float:
    reader, right = Reader.of(model, None), 0.0
    for _, some in Rows(list(rows), "examples", reader).batches(batch, model.device, None):
        given = {name: value for name, value in some.items() if name != "labels"}
        right += float(row_accuracy(model(**given).logits, some["labels"], reader.causal).sum())
    return right / len(rows)


def _called(model: Model) -> str:
    if model.load is not None:
        return model.load
    return f"new ({', '.join(f'{name}={value}' for name, value in (model.new or {}).items())})" if model.new else "new"


StreamComparison.works, ErasureComparison.works = StreamWorker, ErasureWorker
