"""Mixers, on tasks that a small model is trained on from nothing: what can such a layer hold?"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import pydantic
import torch

from vestige.errors import SpecError
from vestige.evidence.budgets import label
from vestige.evidence.compare.plan import Ask, Cell, Job, Trainer, scored
from vestige.evidence.compare.spec import Comparison, Lines, PlacedError
from vestige.evidence.descent import descend
from vestige.evidence.engine.bench import now
from vestige.evidence.engine.record import cell_key
from vestige.evidence.tasks.task import Task, TrainingTask
from vestige.layers.channels.base import Channel
from vestige.layers.mixers.base import Mixer
from vestige.models.config import VestigeConfig
from vestige.models.hub import find_device

__all__ = ["Lesson", "Sizes", "TrainingCell", "TrainingComparison", "TrainingWorker"]

PROBED = 4  # steps by which the time of all is estimated, the first of them not counted
CHANNEL = "swiglu"
ASKED_APART = 2**32  # the rows of an examination come from seeds above this, those of the lessons from seeds below


class Sizes(pydantic.BaseModel):
    """The small model that a mixer stands in: the same for all of them but for the mixer.

    Attributes:
        layers: blocks, each of the mixer and a channel mixer.
        hidden: channels.
        heads: of mixers that have heads and do not say how many.
        channel: name or spec of the channel mixer.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: Annotated[int, pydantic.Field(ge=1)] = 2
    hidden: Annotated[int, pydantic.Field(ge=1)] = 64
    heads: Annotated[int, pydantic.Field(ge=1)] = 2
    channel: Channel = pydantic.Field(default_factory=lambda: Channel.from_spec(CHANNEL))

    def told(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dict(self), "channel": self.channel.spec()}

    def config(self, mixer: Mixer, task: TrainingTask) -> VestigeConfig:
        """The model's configuration.

        Raises:
            SpecError: the mixer does not fit in there.
        """
        return VestigeConfig(
            blocks=[{"mixer": mixer, "repeat": self.layers}],
            channel=self.channel,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            vocab_size=task.vocabulary,
            max_position_embeddings=task.length,
            initializer_range=self.hidden**-0.5,  # what large models begin with would keep one so narrow silent
        )

    def __str__(self) -> str:
        blocks = f"{self.layers} {'layer' if self.layers == 1 else 'layers'} of {self.hidden}, {self.heads} heads"
        channel = label(self.channel)
        return blocks if channel == CHANNEL else f"{blocks}, {channel}"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How all are trained and asked.

    Attributes:
        steps: of the optimizer.
        rows: in a step.
        rate: the largest step size.
        examples: rows, of others than those of the training, on which the trained model is asked.
    """

    steps: int
    rows: int
    rate: float
    examples: int


class TrainingComparison(Comparison):
    """Mixers x tasks x models x seeds: what a small model of such layers learns to hold.

    Attributes:
        tasks: tasks that a model is trained on, by name or spec.
        methods: mixers, by name or spec.
        models: sizes of the model that each of them stands in; see :class:`Sizes`.
        seeds: of weights and rows.
        steps: of the training, with AdamW.
        rows: in a step.
        rate: the largest step size, after a tenth of the steps; then it falls as a cosine.
        examples: rows that the trained model is asked, per task and seed; none of them are those of the training.
        batch: of these, rows that run together.
        device: where to train; ``"auto"`` is the accelerator if there is one.
    """

    family: ClassVar[type[Task]] = TrainingTask
    about: ClassVar[str] = "tasks that a model is trained on"

    tasks: tuple[TrainingTask, ...] = pydantic.Field(min_length=1)
    methods: tuple[Mixer, ...] = pydantic.Field(min_length=1)
    models: tuple[Sizes, ...] = pydantic.Field((Sizes(),), min_length=1)
    steps: int = pydantic.Field(1000, ge=1)
    rows: int = pydantic.Field(64, ge=1)
    rate: float = pydantic.Field(3e-3, gt=0)
    examples: int = pydantic.Field(256, ge=1)
    batch: int = pydantic.Field(64, ge=1)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> TrainingComparison:
        for (place, mixer), sizes, task in itertools.product(enumerate(self.methods), self.models, self.tasks):
            try:
                sizes.config(mixer, task)
            except SpecError as error:
                raise PlacedError(("methods", place), f"{mixer.name} in a model with {sizes}: {error}") from None
        return self

    def worker(self) -> Callable[[], Any]:
        return TrainingWorker

    def plan(self, ask: Ask, lines: Lines) -> TrainingPlan:
        return TrainingPlan(self, ask)

    @classmethod
    def again(cls, told: Mapping[str, Any], key: str) -> dict[str, Any]:
        task, mixer = TrainingTask.from_spec(told["task"]), Mixer.from_spec(told["method"])
        assert isinstance(task, TrainingTask) and isinstance(mixer, Mixer)
        cell = TrainingCell(
            model=told["model"],
            task=task,
            method=mixer,
            seed=told["seed"],
            sizes=Sizes(**told["sizes"]),
            lesson=Lesson(**told["lesson"]),
            batch=told["batch"],
            device=told["device"],
            given=told["given"],
            key=key,
        )
        return TrainingWorker().run(Job(cells=(cell,)))[0]


@dataclass(frozen=True, kw_only=True)
class TrainingCell(Cell):
    """A mixer on a task, in a model of some sizes, with a seed."""

    task: TrainingTask
    method: Mixer
    sizes: Sizes
    lesson: Lesson
    batch: int
    device: str

    def keyed(self, given: Mapping[str, str]) -> TrainingCell:
        """The cell with the key that all it depends on gives."""
        key = cell_key(
            "compare",
            **given,
            method=self.method.spec(),
            task=self.task.spec(),
            seed=self.seed,
            sizes=self.sizes.told(),
            lesson=asdict(self.lesson),
        )
        return replace(self, key=key, given=given)

    def how(self) -> dict[str, Any]:
        lesson = asdict(self.lesson)
        return {"sizes": self.sizes.told(), "lesson": lesson, "batch": self.batch, "device": self.device}


class TrainingPlan:
    """Cells model by model, task by task, seed by seed, each a job of its own."""

    def __init__(self, chosen: TrainingComparison, ask: Ask) -> None:
        self.ask = ask
        given = ask("given", chosen.device)
        lesson = Lesson(steps=chosen.steps, rows=chosen.rows, rate=chosen.rate, examples=chosen.examples)
        same: dict[str, Any] = {"lesson": lesson, "batch": chosen.batch, "device": chosen.device}
        self.cells = [
            TrainingCell(model=str(sizes), task=task, method=mixer, seed=seed, sizes=sizes, **same).keyed(given)
            for sizes, task, mixer, seed in chosen.each()
        ]

    def jobs(self, missing: Iterable[TrainingCell]) -> list[Job]:
        """A job for each cell. How long it takes is seen on a few steps, once for all seeds."""

        @functools.cache
        def seconds(alike: TrainingCell) -> float:
            return float(self.ask("seconds", alike))

        return [Job(cells=(cell,), seconds=seconds(replace(cell, seed=0))) for cell in missing]


class TrainingWorker(Trainer):
    """Trains models and asks them."""

    def seconds(self, cell: TrainingCell) -> float:
        """About how long a cell takes, seen on its first steps; nothing where it fails: its row will tell why."""
        short = replace(cell, lesson=replace(cell.lesson, steps=PROBED))
        ends: list[float] = []
        try:
            self._train(short, after=lambda step: ends.append(time.perf_counter()))
        except Exception:
            return 0.0
        return (ends[-1] - ends[0]) / (PROBED - 1) * cell.lesson.steps

    def _measure(self, cell: TrainingCell) -> dict[str, Any]:
        began = time.perf_counter()
        model, losses = self._train(cell)
        seconds = now(model.device) - began
        score = cell.task.score(model, seed=ASKED_APART + cell.seed, count=cell.lesson.examples, batch_size=cell.batch)
        tail = losses[-max(1, len(losses) // 20) :]
        return cell.row(
            metrics={
                score.metric: score.value,
                "loss": sum(tail) / len(tail),
                "parameters": sum(weight.numel() for weight in model.parameters()),
            },
            kv_bytes=_held(model, cell.task),
            seconds=seconds,
            scored=scored(cell.task, score),
        )

    def _train(self, cell: TrainingCell, after: Callable[[int], None] = lambda step: None) -> tuple[Any, list[float]]:
        from vestige.models.lm import VestigeLM

        device, task, lesson = find_device(cell.device), cell.task, cell.lesson
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            model = VestigeLM(cell.sizes.config(cell.method, task)).to(device).train()

            def loss(chance: torch.Generator) -> torch.Tensor:
                batch = task.draw(lesson.rows, chance).to(device)
                return task.loss(model(batch.tokens).logits, batch.targets)

            losses = descend(model, loss, steps=lesson.steps, rate=lesson.rate, seed=cell.seed, after=after)
        return model.eval(), losses


@torch.no_grad()
def _held(model: Any, task: TrainingTask) -> int:
    """Bytes of the state after one row."""
    row = task.draw(1, torch.Generator().manual_seed(0)).tokens.to(model.device)
    return int(model(row, use_cache=True).past_key_values.nbytes)
