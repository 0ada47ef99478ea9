"""What a learner's hooks are given: the model, where the run stands, and the few operations that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vestige.core.anatomy import Anatomy
from vestige.errors import InputError, UnsupportedModelError
from vestige.weights.modes import evaluating
from vestige.weights.rows import IGNORED, accepted, label_count, logits_of, within

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from vestige.weights.retain.stream import Experience, Stream

__all__ = ["Collate", "Session", "is_classification", "wide", "without_labels"]


class Collate:
    """Puts rows together with the user's collator, and keeps their ``index`` and ``task`` beside.

    Labels and tokens that the model does not know are refused here, before a GPU sees them: it would not go on.

    Args:
        collator: of the user.
        labels: how many labels (or tokens to predict) the model knows; ``None`` for any.
        tokens: how many token ids.
        columns: what of a row is for the model; ``None`` for all of it.

    Raises:
        InputError: when called, for rows that cannot be put together, rows without labels, or with labels or tokens
            that are out of range.
    """

    def __init__(
        self,
        collator: Any,
        labels: int | None = None,
        tokens: int | None = None,
        columns: frozenset[str] | None = None,
    ) -> None:
        self.collator, self.known, self.columns = collator, {"labels": labels, "input_ids": tokens}, columns

    @classmethod
    def of(cls, model: nn.Module, collator: Any, all_columns: bool = False) -> Collate:
        """With what a model says of itself."""
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        return cls(collator, label_count(model), vocabulary, None if all_columns else accepted(model))

    def taken(self, row: dict[str, Any]) -> dict[str, Any]:
        """What of a row is for the model."""
        return {
            key: value
            for key, value in row.items()
            if key not in ("index", "task") and (self.columns is None or key in self.columns)
        }

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        marks = {key: torch.tensor([row.get(key, -1) for row in rows]) for key in ("index", "task")}
        try:
            batch = self.collator([self.taken(row) for row in rows])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{_where(rows[0])} and those beside it cannot be put together: "
                f"{str(error).splitlines()[0]}; give a collator (of tokens: vestige.weights.retain.padding.PadTokens)"
            ) from error
        for key, what in (("labels", "label"), ("input_ids", "token")):
            self._check(batch, key, what, rows)
        return {**batch, **marks}

    def _check(self, batch: dict[str, Any], key: str, what: str, rows: list[dict[str, Any]]) -> None:
        values = batch.get(key)
        if values is None and key == "labels":
            held = sorted(rows[0].keys() - {"index", "task"})
            raise InputError(f"{_where(rows[0])} has no 'labels'; it has {', '.join(held)}")
        if not isinstance(values, Tensor) or (values.is_floating_point() and key != "labels"):
            return
        if values.is_floating_point():
            raise InputError(f"{_where(rows[0])}: labels are {values.dtype}; allowed: whole numbers")
        counts = values if values.ndim == 1 or key != "labels" else values[values != IGNORED]
        try:
            if counts.numel():
                within(counts, self.known[key], "", what)
        except InputError:
            for row, own in zip(rows, values, strict=True):
                own = own if values.ndim == 1 or key != "labels" else own[own != IGNORED]
                if own.numel():
                    within(own, self.known[key], _where(row), what)
            raise


def _where(row: dict[str, Any]) -> str:
    task = row.get("task", -1)
    return f"row {row.get('index', 0)} of " + (f"experience {task}" if task >= 0 else "the general or held-out samples")


class Session:
    """One run of a learner.

    Attributes:
        model: the model that is trained, without wrappers of Accelerate.
        stream: all experiences.
        experience: the one being learnt.
        indices, tasks: the rows of the current micro-batch and the experiences that they belong to, by which
            :meth:`example` finds them (batch,).
        step, epoch: updates made in this experience, and passes over it (a fraction).
        steps: updates that this experience will take.
        general: general samples, if any were given.
        generator: random numbers of the learner's own; drawing from it changes nothing else.
        scale: by which gradients are multiplied where 16-bit floats need it.
    """

    def __init__(
        self, model: nn.Module, stream: Stream, args: TrainingArguments, collate: Collate, general: Any = None
    ) -> None:
        self.model, self.stream, self.args, self.collate, self.general = model, stream, args, collate, general
        self.experience: Experience = stream[0]
        self.indices = self.tasks = torch.empty(0, dtype=torch.long)
        self.step, self.epoch, self.steps = 0, 0.0, 0
        self.scale = 1.0
        self.generator = torch.Generator().manual_seed(args.seed)
        self.autocast: Any = nullcontext
        self.lr = args.learning_rate
        self._homes: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._foreign: dict[tuple[int, torch.device], Tensor] = {}  # classes not of an experience, on a device

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def example(self, experience: int, index: int) -> dict[str, Tensor]:
        """One training row as tensors, as the dataset gives it now."""
        row = self.collate.taken(self.stream[experience].train.example(index))
        return {key: torch.as_tensor(value) for key, value in row.items()}

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows, padded together, on the model's device, without ``index`` and ``task``."""
        return self.inputs(self.collate(rows))

    def inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the model takes of a collated batch, on its device."""
        chosen = {key: value for key, value in batch.items() if key not in ("index", "task")}
        return {key: value.to(self.device) for key, value in chosen.items()}

    def batches(self, rows: Dataset, size: int | None = None, shuffle: bool = False) -> Iterator[dict[str, Tensor]]:
        """Batches of a dataset on the model's device, in order, or shuffled by :attr:`generator`."""
        # A generator of its own, so that looking at data does not change the random numbers of training.
        draw = self.generator if shuffle else torch.Generator()
        width = size or self.args.per_device_eval_batch_size
        for batch in DataLoader(rows, width, shuffle=shuffle, collate_fn=self.collate, generator=draw):
            yield self.inputs(batch)

    def forward(self, batch: dict[str, Tensor], **options: Any) -> Any:
        """The model's outputs on a batch, in the precision of training; no loss is computed by the model for labels
        that are one number per row."""
        given = without_labels(batch) if is_classification(batch) else batch
        with self.autocast():
            return self.model(**given, **options)

    def objective(self, outputs: Any, batch: dict[str, Tensor], tasks: Tensor | None = None) -> Tensor:
        """The mean loss of a batch: cross-entropy over the labels allowed, or the model's own.

        Args:
            outputs: of the model on the batch.
            batch: rows with labels.
            tasks: the experience of each row (batch,); those of the current micro-batch if ``None``.
        """
        if not is_classification(batch):
            return outputs.loss
        logits = self.allowed(logits_of(outputs, self.model), self.tasks if tasks is None else tasks, batch["labels"])
        return F.cross_entropy(wide(logits), batch["labels"], label_smoothing=self.args.label_smoothing_factor)

    def allowed(self, logits: Tensor, tasks: Tensor, labels: Tensor) -> Tensor:
        """Logits (batch, classes) in which, in a task stream, only labels of a row's experience can win: a row that
        strayed into another's is of that to which its label belongs."""
        if self.stream.kind != "task":
            return logits
        shut, home = self._tasks(logits)
        tasks = tasks.to(logits.device)
        strayed = shut[tasks].gather(1, labels[:, None])[:, 0]
        return logits.masked_fill(shut[torch.where(strayed, home[labels], tasks)], torch.finfo(logits.dtype).min)

    def _tasks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a label is none of an experience's (experiences, classes), and the experience of each (classes,)."""
        place = (logits.shape[-1], logits.device)
        if place not in self._homes:
            shut = torch.ones(len(self.stream), logits.shape[-1], dtype=torch.bool)
            home = torch.zeros(logits.shape[-1], dtype=torch.long)
            for experience in reversed(self.stream.experiences):
                own = list(experience.classes or ())
                shut[experience.index, own] = False
                home[own] = experience.index
            self._homes[place] = (shut.to(logits.device), home.to(logits.device))
        return self._homes[place]

    def answers(self, logits: Tensor, experience: Experience | None) -> Tensor:
        """The label that each row is given (batch,): one of its experience in a task stream, one of the stream in a
        class stream; one of all that the model has in a domain stream, and for rows that are of no experience."""
        among = {"task": experience.classes, "class": self.stream.classes}.get(self.stream.kind) if experience else None
        if not among:
            return logits.argmax(-1)
        labels = torch.tensor(among, device=logits.device)
        return labels[logits[:, labels].argmax(-1)]

    def among_own(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (batch, classes) in which only classes of this experience can win; the others have no gradient.

        Labels that strayed into the batch from other experiences count as its own.
        """
        place = (self.experience.index, logits.device)
        if place not in self._foreign:
            foreign = torch.ones(logits.shape[-1], dtype=torch.bool)
            foreign[list(self.experience.classes or ())] = False
            self._foreign[place] = foreign.to(logits.device)
        logits = wide(logits)
        return logits.masked_fill(self._foreign[place].index_fill(0, labels, False), torch.finfo(logits.dtype).min)

    def formerly(self, batch: dict[str, Tensor], weights: dict[str, Tensor]) -> Any:
        """What the model answers with former weights in the place of its own; no second model is held."""
        with self.evaluating(), self.autocast():
            return functional_call(self.model, weights, (), without_labels(batch))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def head(self) -> tuple[str, nn.Module]:
        """The output layer and its name.

        Raises:
            UnsupportedModelError: the model has none, or is of an unknown architecture.
        """
        head = Anatomy.of(self.model).head
        if head is None:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no output layer")
        return next((name, part) for name, part in self.model.named_modules() if part is head)

    def evaluating(self) -> AbstractContextManager[None]:
        """No dropout and no gradients inside the block."""
        return evaluating(self.model, gradients=False)


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_classification(batch: dict[str, Any]) -> bool:
    """Whether each row has one whole number as its label."""
    labels = batch.get("labels")
    return labels is not None and labels.ndim == 1 and not labels.is_floating_point()


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}
