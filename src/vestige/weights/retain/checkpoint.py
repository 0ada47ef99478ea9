"""What an interrupted run needs to go on, on disk.

In the folder: ``stream.json`` (what is run, and the scores so far), ``learnt-K`` (weights and the learner's state
after experience K), ``experience-K`` (the checkpoints of the ``Trainer`` while K is learnt, each with the learner's
state, and a mark that it is complete).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vestige.core.files import drafted, write_whole
from vestige.errors import InputError, SpecError

if TYPE_CHECKING:
    from vestige.weights.retain.learner import Running
    from vestige.weights.retain.session import Session

__all__ = ["Checkpoints", "read_tensors", "write_tensors"]

STREAM, STATE, WEIGHTS, MARK = "stream.json", "learner.safetensors", "weights.safetensors", "complete"
GENERATOR = "generator"


class Checkpoints:
    """The folder of one run."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.description: dict[str, Any] = {}

    def open(self, description: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """The scores of the run that is taken up, or ``None`` for a new one.

        Raises:
            SpecError: there is a run, and it is another or was not to be resumed.
        """
        self.description = json.loads(json.dumps(description))
        there = self.root / STREAM
        held: dict[str, Any] = json.loads(there.read_text()) if there.exists() else {"scores": None}
        if held["scores"] is None and not any(self.root.glob("experience-*")):  # none, or refused before any work
            self.root.mkdir(parents=True, exist_ok=True)
            self._write({"run": self.description, "scores": None})
            return None
        if not resume:
            raise SpecError(f"{self.root} holds a run; go on with it by resume=True, or choose another output_dir")
        for name, wanted in self.description.items():
            if held["run"].get(name) != wanted:
                raise SpecError(f"{self.root} holds a run with another {name}: {held['run'].get(name)}, not {wanted}")
        return held["scores"]

    def folder(self, experience: int) -> Path:
        return self.root / f"experience-{experience}"

    def newest(self, experience: int) -> Path | None:
        """The last complete checkpoint of an experience."""
        found = [mark.parent for mark in self.folder(experience).glob(f"checkpoint-*/{MARK}")]
        return max(found, key=lambda place: int(place.name.rpartition("-")[2]), default=None)

    def put_state(self, place: Path, session: Session, running: Running) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / MARK).unlink(missing_ok=True)
        write_tensors(place / STATE, {**running.tensors(), GENERATOR: session.generator.get_state()})

    def state(self, place: Path, session: Session) -> dict[str, Tensor]:
        """The learner's state of a checkpoint; the generator goes on from there."""
        tensors = load_file(place / STATE)
        session.generator.set_state(tensors.pop(GENERATOR))
        # Copied, as where tensors begin in a file's memory changes the last bits of some products.
        return {name: tensor.to(session.device, copy=True) for name, tensor in tensors.items()}

    def put_weights(self, place: Path, session: Session) -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_tensors(place / WEIGHTS, _weights(session))

    @torch.no_grad()
    def load_weights(self, place: Path, session: Session) -> None:
        own = dict(session.model.named_parameters()) | dict(session.model.named_buffers())
        for name, value in load_file(place / WEIGHTS).items():
            own[name].copy_(value)

    def complete(self, place: Path) -> None:
        (place / MARK).touch()

    def keep(self, session: Session, running: Running, scores: dict[str, Any]) -> None:
        """Keep what was learnt with an experience, and let go of what led there."""
        index = session.experience.index
        place = self.root / f"learnt-{index}"
        self.put_state(place, session, running)
        self.put_weights(place, session)
        self._write({"run": self.description, "scores": scores})
        # Only now is nothing before it needed any more.
        shutil.rmtree(self.folder(index), ignore_errors=True)
        if index:
            shutil.rmtree(self.root / f"learnt-{index - 1}", ignore_errors=True)

    def restore(self, session: Session, running: Running) -> None:
        """Weights and state as they were after the last experience that was learnt whole."""
        scores = json.loads((self.root / STREAM).read_text())["scores"]
        place = self.root / f"learnt-{len(scores['matrix']) - 1}"
        self.load_weights(place, session)
        running.load(self.state(place, session))

    def _write(self, content: dict[str, Any]) -> None:
        write_whole(self.root / STREAM, json.dumps(content))


def _weights(session: Session) -> dict[str, Tensor]:
    """What training may have changed: all of a plain model, or what is trained of one with adapters."""
    model = session.model
    every = dict(model.named_parameters()) | dict(model.named_buffers())
    return session.trainable() if hasattr(model, "peft_config") else every  # type: ignore[return-value]


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; tensors that share storage are written one by one.

    Args:
        path: of the file.
        tensors: by name.
        about: what else the file says.
    """
    with drafted(path) as draft:
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, draft, about)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what else it says.

    Raises:
        InputError: no such file, or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{os.fspath(path)!r} cannot be read: {error}") from error
