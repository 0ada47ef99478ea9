"""Train a language model on text, from a description in a file.

>>> from vestige.training.pretrain import train
>>> trained = train("hybrid.yaml")

transformers' ``Trainer`` does the work, so ``torchrun`` and ``accelerate launch`` carry it to more devices. What a
folder holds already is gone on from; the model is saved as safetensors, and the outcome as a row of a ledger.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pydantic
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from vestige.core.files import read_description
from vestige.core.ledger import Ledger
from vestige.core.spec import did_you_mean
from vestige.errors import SpecError
from vestige.models.lm import VestigeConfig, VestigeLM
from vestige.training.quiet import without_bars
from vestige.training.text import find_files, make_tokenizer, split, tokens_of

__all__ = ["Trained", "Training", "read", "train"]


class Training(pydantic.BaseModel):
    """What is trained, on what, and how. Every field may stand in the YAML file.

    Attributes:
        out: the folder for the model, its checkpoints and the ledger.
        data: files, folders and patterns of UTF-8 text.
        model: the fields of a :class:`~vestige.models.config.VestigeConfig`; ``vocab_size`` may be more than the
            tokenizer's, which it is by default.
        tokenizer: ``bytes``, ``bpe:4096`` (learnt from the data), a folder, or a Hugging Face id.
        length: tokens per sequence.
        batch: sequences per step and process; ``accumulate`` such batches make one step.
        steps: of the optimizer.
        learning_rate: its peak, after ``warmup`` steps; then it falls as a cosine.
        weight_decay: of the weights of linear maps and the embedding, nothing else.
        clip: largest norm of the gradient.
        precision: ``bfloat16`` computes under autocast; weights stay float32.
        checkpointing: whether activations are recomputed, which saves memory.
        held_out: share of the text, from its end, on which the loss is looked at.
        evaluate_every, save_every: steps; default: a tenth of all.
        seed: of weights and order.
        trainer: further fields of transformers' ``TrainingArguments``.
    """

    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())

    out: Path
    data: list[str] = pydantic.Field(min_length=1)
    model: dict[str, Any] = {}
    tokenizer: str = "bytes"
    length: int = pydantic.Field(512, ge=2)
    batch: int = pydantic.Field(8, ge=1)
    accumulate: int = pydantic.Field(1, ge=1)
    steps: int = pydantic.Field(1000, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    warmup: int = pydantic.Field(50, ge=0)
    weight_decay: float = pydantic.Field(0.1, ge=0)
    clip: float = pydantic.Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    held_out: float = pydantic.Field(0.05, gt=0, lt=1)
    evaluate_every: int | None = pydantic.Field(None, ge=1)
    save_every: int | None = pydantic.Field(None, ge=1)
    seed: int = 0
    trainer: dict[str, Any] = {}


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        folder: where model and tokenizer are, for ``from_pretrained``.
        model: the trained model.
        loss: on the text held out, in nats per token; ``bits_per_byte`` is the same in a unit that tokenizers share.
        steps: of the optimizer, all runs together.
        finished: whether all steps were taken; False where somebody interrupted, and the same call will go on.
    """

    folder: Path
    model: VestigeLM
    loss: float
    bits_per_byte: float
    steps: int
    finished: bool


def read(source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any) -> Training:
    """A description from a YAML file or a mapping, with changes. Relative paths in a file are relative to the file.

    Raises:
        InputError: no such file.
        SpecError: no YAML, an unknown field, or a value that is not allowed; names the field and the value.
    """
    settings, base = read_description(Training, source, **changes)
    paths = {"out": base / settings.out, "data": [str(base / Path(name).expanduser()) for name in settings.data]}
    return settings if isinstance(source, Mapping) else settings.model_copy(update=paths)


def train(
    source: str | os.PathLike[str] | Mapping[str, Any] | Training, *, fresh: bool = False, quiet: bool = False
) -> Trained:
    """Train a model.

    A first Ctrl-C (or SIGTERM) finishes the step, saves, and returns; the same call goes on from there.

    Args:
        source: a YAML file, a mapping, or a :class:`Training`.
        fresh: begin anew where the folder holds a run already.
        quiet: show no progress.

    Raises:
        SpecError: an invalid description; or a folder whose run was described otherwise.
        InputError: data that cannot be read, or too little of it.
    """
    settings = source if isinstance(source, Training) else read(source)
    files = find_files(settings.data)
    if settings.out.is_file():
        raise SpecError(f"field 'out': {str(settings.out)!r} is a file; allowed: a folder, which may be there already")
    _config(settings, {"vocab_size": 1})  # what cannot be built is refused before a tokenizer is made
    checkpoints = settings.out / "checkpoints"
    arguments = _arguments(settings, checkpoints, quiet)  # from here on the processes know one another
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one device; the Trainer would take all that it sees
    with arguments.main_process_first(local=False, desc="tokenizer"):  # one of all nodes makes it, and all read it
        first = arguments.process_index == 0
        _same_run(settings, checkpoints, fresh and first, write=first)
        tokenizer = _tokenizer(settings, files, first)
    tokens, size = tokens_of(tokenizer, files)
    seen, held_out = split(tokens, settings.length, settings.held_out)
    set_seed(settings.seed)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = _config(settings, {**special, "vocab_size": len(tokenizer)})
    caching, model = config.use_cache, VestigeLM(config)
    stop = _StopWhenAsked()
    trainer = _Trainer(
        model=model, args=arguments, train_dataset=seen, eval_dataset=held_out, callbacks=[stop, _Progress(quiet)]
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    began = time.perf_counter()
    if last is not None and _steps_of(last) >= settings.steps:  # the Trainer would take one step more
        trainer.state.global_step = _steps_of(last)
        load_model(model, str(settings.out / "model.safetensors"), device=str(model.device))
        finished_before = True
    else:
        with stop, without_bars():
            trainer.train(resume_from_checkpoint=last)
        finished_before = False
    took = time.perf_counter() - began
    loss = trainer.evaluate()["eval_loss"]
    model.config.use_cache = caching  # the Trainer has written its own there
    trained = Trained(
        folder=settings.out,
        model=model,
        loss=loss,
        bits_per_byte=loss / math.log(2) * len(tokens) / size,
        steps=trainer.state.global_step,
        finished=trainer.state.global_step >= settings.steps,
    )
    if not finished_before:
        with without_bars():
            trainer.save_model(str(settings.out))
        if first:
            (settings.out / "training_args.bin").unlink(missing_ok=True)  # a pickle; training.yaml says it all
            _record(trained, settings, took, arguments.world_size)
    trainer.accelerator.wait_for_everyone()
    return trained


def _tokenizer(settings: Training, files: list[Path], first: bool) -> Any:
    """The tokenizer of the run: the first process makes it, the others, and later runs, read it."""
    if not (settings.out / "tokenizer.json").is_file() and first:
        make_tokenizer(settings.tokenizer, files).save_pretrained(settings.out)
    return make_tokenizer(str(settings.out), files)


def _config(settings: Training, of_tokenizer: Mapping[str, Any]) -> VestigeConfig:
    """The model's, with what only a tokenizer tells."""
    known = inspect.signature(VestigeConfig).parameters
    for name in settings.model:
        if name not in known:
            raise SpecError(f"field 'model': unknown field {name!r}; {did_you_mean(name, known)}")
    context = {"max_position_embeddings": max(settings.length, 2048)}
    least, given = of_tokenizer["vocab_size"], settings.model.get("vocab_size")
    if type(given) is int and given < least:
        raise SpecError(f"field 'model': vocab_size is {given}; the tokenizer has {least} tokens (and is the default)")
    return VestigeConfig(**{**context, **of_tokenizer, **settings.model})


def _steps_of(checkpoint: str) -> int:
    """The steps after which a checkpoint was saved."""
    return int(checkpoint.rpartition("-")[2])


class _Trainer(Trainer):
    """Decays the weights of linear maps and the embedding, and no gate, gain, bias or rate."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Embedding)]


class _Progress(TrainerCallback):
    """One line on standard error: steps, losses, time left."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self.task: Any = None
        self.seen = {"loss": "", "held out": ""}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any) -> None:
        for name, key in (("loss", "loss"), ("held out", "eval_loss")):
            if key in (logs or {}):
                self.seen[name] = f"{float(logs[key]):.3f}"
        if self.task is not None:
            told = ", ".join(f"{name} {value}" for name, value in self.seen.items() if value)
            self.bar.update(self.task, description=told or "training")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.bar.stop()


class _StopWhenAsked(TrainerCallback):
    """Turns the first interrupt into a save after the step; the second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopWhenAsked:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread, where signals do not arrive either
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> TrainerControl:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


def _arguments(settings: Training, checkpoints: Path, quiet: bool) -> TrainingArguments:
    tenth = max(1, settings.steps // 10)
    known = {
        "output_dir": str(checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "adam_beta2": 0.95,
        "bf16": settings.precision == "bfloat16",
        "eval_strategy": "steps",
        "eval_steps": settings.evaluate_every or tenth,
        "save_steps": settings.save_every or tenth,
        "save_total_limit": 2,
        "logging_steps": max(1, tenth // 5),
        "seed": settings.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # renamed in transformers 5.2x
        if settings.checkpointing and name in TrainingArguments.__dataclass_fields__:
            known[name] = True
            break
    unknown = [name for name in settings.trainer if name not in TrainingArguments.__dataclass_fields__]
    if unknown:
        raise SpecError(f"field 'trainer': TrainingArguments has no {', '.join(unknown)}")
    try:
        return TrainingArguments(**{**known, **settings.trainer})
    except (TypeError, ValueError) as error:
        raise SpecError(f"transformers' TrainingArguments refuses this: {str(error).splitlines()[0]}") from error


def _same_run(settings: Training, checkpoints: Path, fresh: bool, write: bool) -> None:
    """Keep the description beside the checkpoints, and refuse to go on under another one."""
    note = settings.out / "training.yaml"
    described = settings.model_dump(mode="json", exclude={"out"})
    if fresh:
        shutil.rmtree(checkpoints, ignore_errors=True)
        (settings.out / "tokenizer.json").unlink(missing_ok=True)
    if checkpoints.is_dir() and note.is_file():
        before = yaml.safe_load(note.read_text(encoding="utf-8"))
        other = [name for name in described if before.get(name) != described[name]]
        if other:
            raise SpecError(
                f"{settings.out} holds a run that was described otherwise ({', '.join(other)}); go on with that "
                f"description, choose another folder, or begin anew (fresh)"
            )
    if write:
        settings.out.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_suffix(".tmp")
        unfinished.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
        unfinished.replace(note)


def _record(trained: Trained, settings: Training, took: float, processes: int) -> None:
    """One row of the ledger in the folder."""
    model = trained.model
    with torch.no_grad():
        state = model.new_state()
        model.eval()(torch.zeros(1, settings.length, dtype=torch.long, device=model.device), past_key_values=state)
    Ledger(settings.out / "ledger.jsonl").append(
        model=settings.out.name,
        task={"name": "language-modelling", "data": settings.data, "length": settings.length},
        seed=settings.seed,
        metrics={"loss": trained.loss, "bits_per_byte": trained.bits_per_byte},
        blocks=model.config.blocks,
        parameters=model.num_parameters(),
        steps=trained.steps,
        tokens=trained.steps * settings.batch * settings.accumulate * processes * settings.length,
        processes=processes,
        finished=trained.finished,
        state_bytes=state.nbytes,
        seconds=took,
    )
