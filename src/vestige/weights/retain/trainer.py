"""The loop: a stream, learnt experience by experience with transformers' ``Trainer``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DefaultDataCollator, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vestige.errors import InputError, SpecError, TrainingError, UnsupportedModelError
from vestige.weights.modes import same_use_of_cache
from vestige.weights.retain.checkpoint import Checkpoints
from vestige.weights.retain.learner import Learner, Running
from vestige.weights.retain.result import ContinualRun
from vestige.weights.retain.session import Collate, Session, is_classification, without_labels
from vestige.weights.retain.stream import Experience, Rows, Stream
from vestige.weights.rows import IGNORED, by_number, label_count, logits_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vestige.core.ledger import Ledger

__all__ = ["ContinualTrainer"]


class ContinualTrainer:
    """Teaches a model a stream of experiences with a learner.

    Each experience gets its own ``transformers.Trainer`` (optimizer, schedule, folder), so everything that
    ``TrainingArguments`` offers applies to each: mixed precision, accumulation, clipping, schedules. After each
    experience the model is scored on all. With ``save_strategy="no"`` nothing is written; otherwise the weights and
    the learner's state are kept in ``output_dir`` after each experience and with each checkpoint, and
    ``run(stream, resume=True)`` goes on where an interrupted run stopped, with the same result.

    Args:
        model: a transformers model, or one inside a PEFT wrapper. It is trained in place.
        learner: a learner, a sum of several, or a spec.
        args: see transformers; ``eval_strategy`` must be ``"no"``, as scoring is done here. Default: three epochs of
            batches of 32, no files.
        collator: puts rows together; the default stacks equal shapes. Columns that the model does not take are left
            out before, unless ``args.remove_unused_columns`` is false.
        general: general samples for learners that need them, a map-style dataset of rows for the model.
        held_out: general text (or other general samples) on which what the model could do before is measured.
        ledger: where the result is recorded.
        model_name: what the ledger calls the model.
        callbacks: for each ``Trainer``.

    Attributes:
        running: the learner's state of the last run, with what it learnt beside the model's own weights.

    Raises:
        SpecError: wrong arguments.
        InputError: no model; the learner needs general samples, and none were given; samples without rows by number.
    """

    def __init__(
        self,
        model: nn.Module,
        learner: Learner | str | dict[str, Any],
        args: TrainingArguments | None = None,
        *,
        collator: Any = None,
        general: Any = None,
        held_out: Any = None,
        ledger: Ledger | None = None,
        model_name: str = "",
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
        self.model = model
        self.learner = learner if isinstance(learner, Learner) else Learner.from_spec(learner)
        self.args = args or TrainingArguments(
            output_dir="continual", save_strategy="no", per_device_train_batch_size=32, report_to="none"
        )
        if str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no":
            raise SpecError("parameter 'eval_strategy' must be 'no': every experience is scored after each one anyway")
        if self.args.load_best_model_at_end:
            raise SpecError(
                "parameter 'load_best_model_at_end' must be False: the stream goes on from the last weights"
            )
        if self.learner.one_process and self.args.world_size > 1:
            raise SpecError(f"{self.learner.label} keeps state that one process must hold; {self.args.world_size} run")
        if self.learner.needs_general and (general is None or not len(by_number(general, "general"))):
            raise InputError(f"{self.learner.label} needs general samples: ContinualTrainer(..., general=dataset)")
        self.collate = Collate.of(model, collator or DefaultDataCollator(), not self.args.remove_unused_columns)
        self.general, self.held_out = (
            None if found is None else Rows(by_number(found, name), range(len(found)), -1, _main_input(model))
            for found, name in ((general, "general"), (held_out, "held_out"))
        )
        self.ledger, self.model_name, self.callbacks = ledger, model_name, list(callbacks)
        self.running: Running | None = None

    def run(self, stream: Stream, *, resume: bool = False) -> ContinualRun:
        """Learn the stream.

        Args:
            stream: what to learn.
            resume: go on with the run in ``args.output_dir`` if there is one. The model must be as it was when that
                run was started.

        Raises:
            InputError: the learner needs classes that the stream does not name; rows without labels, or with labels
                or tokens that the model does not have.
            UnsupportedModelError: a model without an output layer or without the parts that the learner needs.
            SpecError: the folder holds another run, or one that was not to be resumed.
            TrainingError: the loss or a gradient is no finite number; the model keeps the weights that it had
                before that update. The error's ``run`` holds the result so far.
        """
        self._check(stream)
        session = Session(self.model, stream, self.args, self.collate, self.general)
        running = self.running = self.learner.run_state()
        scores = _Scores(stream, self.learner.spec(), self.args.seed)
        # Before anything is changed on the model, so that a wrong folder costs nothing.
        folder = Checkpoints(self.args.output_dir) if _saves(self.args) else None
        description = {"learner": self.learner.spec(), "stream": stream.describe(), "training": _essence(self.args)}
        begun = folder.open(description, resume) if folder else None
        wanted = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            running.start(session)
            if begun is not None and folder is not None:
                scores.load(begun)
                folder.restore(session, running)
            with same_use_of_cache(self.model):
                for experience in stream.experiences[len(scores.matrix) :]:
                    self._learn(session, running, experience, scores, folder)
        finally:
            running.finish(session)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(wanted.get(name, parameter.requires_grad))
        run = scores.run(running)
        if self.ledger is not None:
            row = run.row(self.model_name)
            same = ("method", "matrix", "seconds")  # a finished run that was taken up again has its row
            if begun is None or not any(all(old.get(name) == row[name] for name in same) for old in self.ledger):
                self.ledger.append(row, task=stream.describe())
        return run

    def _learn(
        self, session: Session, running: Running, experience: Experience, scores: _Scores, folder: Checkpoints | None
    ) -> None:
        session.experience, session.step, session.epoch = experience, 0, 0.0
        args = copy.copy(self.args)
        args.seed = args.data_seed = self.args.seed + experience.index
        args.remove_unused_columns = False
        args.output_dir = str(folder.folder(experience.index) if folder else self.args.output_dir)
        place = _Place(session, running)
        with _timed(place):
            running.before(session, experience)
            rows = running.rows(session, experience)
        trainer = _ExperienceTrainer(
            model=self.model,
            args=args,
            train_dataset=rows,
            data_collator=self.collate,
            callbacks=[*self.callbacks, place],
        )
        trainer.place, trainer.folder = place, folder
        trainer.remove_callback(PrinterCallback)  # who turned progress bars off wants no lines either
        session.autocast = trainer.compute_loss_context_manager
        if not scores.unit:
            scores.start(self, session, running)
        checkpoint = folder.newest(experience.index) if folder else None
        if checkpoint is not None:
            running.load(folder.state(checkpoint, session))  # type: ignore[union-attr]
        own = {name: value for name, value in vars(self.model).items() if name == "forward"}
        began = time.perf_counter() - place.seconds  # what came before counts, the scores do not
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (TrainingError, InputError) as error:
            error.run = scores.run(running) if scores.matrix else None  # type: ignore[union-attr]
            raise
        finally:
            # A precision wrapper around forward must not pile up over experiences, nor be left out of the next one.
            # Accelerate's own way to take it off takes decorators of transformers along.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(self.model).pop(name, None)
            vars(self.model).update(own)
            session.autocast = nullcontext
        with _timed(place):
            running.after(session, experience)
        scores.add(self, session, running, time.perf_counter() - began, place.seconds)
        if folder is not None:
            folder.keep(session, running, scores.plain())

    @torch.no_grad()
    def score(self, session: Session, running: Running, rows: Rows, experience: Experience | None) -> tuple[float, str]:
        """The score on some rows of an experience, or of none, and its unit."""
        right, count, unit = 0.0, 0.0, "accuracy"
        with session.evaluating():
            for batch in session.batches(rows):
                outputs = running.predict(session, batch, session.forward(batch))
                if is_classification(batch):
                    answer = session.answers(logits_of(outputs, session.model), experience)
                    right, count = right + float((answer == batch["labels"]).sum()), count + len(answer)
                else:
                    unit = "log-likelihood"
                    tokens = float((batch["labels"][..., 1:] != IGNORED).sum())
                    right, count = right - float(outputs.loss) * tokens, count + tokens
        if not count:
            whose = "the held-out set" if experience is None else f"experience {experience.index} ({experience.name})"
            raise InputError(f"{whose} has nothing to score")
        return right / count, unit

    def _check(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise InputError(f"the stream is a {type(stream).__name__}; build one with vestige.weights.retain.Stream")
        if self.learner.needs_classes and any(e.classes is None for e in stream):
            raise InputError(f"{self.learner.label} needs the classes of every experience; see Stream.by_class")
        labels = label_count(self.model)
        if stream.classes and labels is not None and stream.classes[-1] >= labels:
            raise InputError(f"the stream has the label {stream.classes[-1]}; the model has labels 0 to {labels - 1}")
        batch = self.args.train_batch_size
        for e in stream:
            if self.args.dataloader_drop_last and len(e.train) < batch:
                raise InputError(
                    f"experience {e.index} ({e.name}) has {len(e.train)} train examples, less than a batch of {batch}, "
                    "which dataloader_drop_last leaves out"
                )
        for rows in (part for e in stream for part in (e.train, e.test)):
            self.collate([rows[0]])  # what is wrong with every row is found before any work
            rows.check(labels)
        for samples in (self.general, self.held_out):
            if samples is not None and len(samples):
                self.collate([samples[0]])
                samples.check(labels)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UnsupportedModelError("no parameter of the model is trained: all have requires_grad=False")


class _Place(TrainerCallback):
    """Calls the learner where the ``Trainer`` stands after an update, and keeps the time of all hooks."""

    def __init__(self, session: Session, running: Running) -> None:
        self.session, self.running, self.seconds = session, running, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.steps = state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.step, self.session.epoch = state.global_step, float(state.epoch or 0.0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self.session.lr = optimizer.param_groups[0]["lr"]
        with _timed(self):
            self.running.stepped(self.session)


class _ExperienceTrainer(Trainer):
    """transformers' ``Trainer`` with the hooks of a learner."""

    place: _Place
    folder: Checkpoints | None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        session, running = self.place.session, self.place.running
        session.indices, session.tasks = inputs["index"].cpu(), inputs["task"].cpu()
        batch = {key: value for key, value in inputs.items() if key not in ("index", "task")}
        # Where the loss is a sum over the tokens of all micro-batches, divided by their number, what is a mean over
        # this micro-batch counts for its share of an update.
        summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        share = self.current_gradient_accumulation_steps if summed else 1
        if is_classification(batch):
            outputs = model(**without_labels(batch))
            with _timed(self.place):
                own = running.objective(session, batch, outputs)
            loss = session.objective(outputs, batch) if own is None else own
        else:
            loss, outputs = super().compute_loss(model, batch, True, num_items_in_batch)
            with _timed(self.place):
                own = running.objective(session, batch, outputs)
            loss = loss * share if own is None else own
        with _timed(self.place):
            loss = running.loss(session, batch, outputs, loss) / share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            self._refuse(f"the loss is {float(loss)}")
        if self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            self.place.session.scale = float(scaler.get_scale()) if scaler is not None else 1.0
            with _timed(self.place):
                self.place.running.gradients(self.place.session)
            # Gradients that overflow under a scaler are its own affair: it leaves the update out.
            if scaler is None and not _finite(self.optimizer):
                self._refuse("a gradient is not finite")
        return loss

    def _refuse(self, what: str) -> None:
        session = self.place.session
        self.model.zero_grad(set_to_none=True)
        raise TrainingError(
            f"{what} in experience {session.experience.index} ({session.experience.name}) at step {session.step}, "
            f"rows {session.indices[:8].tolist()}; the model keeps the weights from before this step"
        )

    # Weights are kept under the model's own names: through ``save_pretrained`` some models (ViT) are stored under
    # others, and ``Trainer`` does not find those again when it resumes.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.folder is None or not _internal_call or output_dir is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.folder.put_weights(Path(output_dir), self.place.session)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.folder is not None
        self.folder.load_weights(Path(resume_from_checkpoint), self.place.session)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.folder is not None and self.args.should_save:
            self.folder.put_state(place, self.place.session, self.place.running)
        super()._save_checkpoint(model, trial)
        if self.folder is not None and self.args.should_save:
            self.folder.complete(place)


class _Scores:
    """The scores while they come in."""

    def __init__(self, stream: Stream, learner: dict[str, Any], seed: int) -> None:
        self.stream, self.learner, self.seed = stream, learner, seed
        self.matrix: list[list[float]] = []
        self.untrained: list[float] = []
        self.general: list[float] = []
        self.seconds: list[float] = []
        self.hooks: list[float] = []
        self.bytes = {"replay_bytes": 0, "state_bytes": 0}
        self.unit = ""

    def start(self, trainer: ContinualTrainer, session: Session, running: Running) -> None:
        self.untrained, self.unit = self._row(trainer, session, running)
        self._general(trainer, session, running)

    def add(self, trainer: ContinualTrainer, session: Session, running: Running, seconds: float, hooks: float) -> None:
        self.matrix.append(self._row(trainer, session, running)[0])
        self._general(trainer, session, running)
        self.seconds.append(seconds)
        self.hooks.append(hooks)
        self.bytes = {kind: max(most, running.nbytes()[kind]) for kind, most in self.bytes.items()}

    def _row(self, trainer: ContinualTrainer, session: Session, running: Running) -> tuple[list[float], str]:
        found = [trainer.score(session, running, e.test, e) for e in self.stream]
        return [score for score, _ in found], found[0][1]

    def _general(self, trainer: ContinualTrainer, session: Session, running: Running) -> None:
        if trainer.held_out is not None:
            self.general.append(trainer.score(session, running, trainer.held_out, None)[0])

    def plain(self) -> dict[str, Any]:
        names = ("matrix", "untrained", "general", "seconds", "hooks", "bytes", "unit")
        return {name: getattr(self, name) for name in names}

    def load(self, plain: dict[str, Any]) -> None:
        for name, value in plain.items():
            setattr(self, name, value)

    def run(self, running: Running) -> ContinualRun:
        return ContinualRun(
            learner=self.learner,
            names=self.stream.names,
            matrix=np.array(self.matrix),
            untrained=np.array(self.untrained),
            general=list(self.general),
            unit=self.unit,
            seconds=list(self.seconds),
            overhead=sum(self.hooks) / max(sum(self.seconds), 1e-9),
            report=running.report(),
            seed=self.seed,
            **self.bytes,
        )


@contextmanager
def _timed(place: _Place) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        place.seconds += time.perf_counter() - began


def _finite(optimizer: Any) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch._foreach_norm(gradients) if gradients else []
    return all(math.isfinite(n) for n in torch.stack([n.float() for n in norms]).tolist()) if norms else True


def _saves(args: TrainingArguments) -> bool:
    return str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"


def _essence(args: TrainingArguments) -> dict[str, Any]:
    """What of the arguments decides the result."""
    names = ("seed", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size")
    more = ("gradient_accumulation_steps", "weight_decay", "warmup_steps", "max_grad_norm")
    return {name: getattr(args, name) for name in (*names, *more)}


def _main_input(model: nn.Module) -> str:
    return getattr(model, "main_input_name", "input_ids")
