"""Descriptions of runs: read from YAML, checked, and kept beside what came of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import pydantic
import yaml

from vestige.core.files import read_description, write_whole

__all__ = ["Data", "Erasing", "Learning", "Model", "Retaining", "differing", "read_spec", "write_spec"]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)


class Data(_Part):
    """Where examples come from.

    Attributes:
        name: ``digits`` (images, with scikit-learn), ``fashion-mnist`` (images, from Debian), ``elements`` and
            ``countries`` (questions and answers, with mendeleev and countryinfo), ``npz`` (images of your own),
            ``jsonl`` (questions and answers of your own).
        file: of ``npz``: arrays ``images`` (rows, channels, height, width), ``labels`` (rows,), and ``test_images`` and
            ``test_labels``. Of ``jsonl``: one object per line, with ``question`` and ``answer``, and where there is
            one ``paraphrase``, and further columns.
        limit: subjects (or rows of images) that are used; all by default.
        fields: of elements and countries, those that are asked for; all by default.
        unseen: share of the subjects (or lines) that no model is taught.
        seed: of what is drawn.
    """

    name: Literal["digits", "fashion-mnist", "elements", "countries", "npz", "jsonl"]
    file: Path | None = None
    limit: int | None = pydantic.Field(None, ge=4)
    fields: list[str] | None = None
    unseen: float = pydantic.Field(0.1, gt=0, lt=1)
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _file_where_one_is_read(self) -> Self:
        if (self.file is not None) != (self.name in ("npz", "jsonl")):
            raise ValueError(f"{self.name} {'takes no' if self.file else 'needs a'} file")
        return self


class Model(_Part):
    """The model: one that there is, or a new one.

    Attributes:
        load: a folder or a Hugging Face id; ``smollm2`` is embedded.
        new: the sizes of a small new one: fields of a ``ViTConfig`` (images) or a ``LlamaConfig`` (text).
        seed: of a new one's weights.
    """

    load: str | None = None
    new: dict[str, Any] | None = None
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.load is None) == (self.new is None):
            raise ValueError("give either 'load' or 'new'")
        return self


class Learning(_Part):
    """How a model is taught: Adam, a step size that falls linearly to zero.

    Attributes:
        epochs: passes over the examples.
        learning_rate: at the start.
        batch: rows in a step.
        seed: of the order.
    """

    epochs: int = pydantic.Field(10, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    batch: int = pydantic.Field(32, ge=1)
    seed: int = 0


class Erasing(_Part):
    """An erasure and its audit.

    Attributes:
        out: the folder for the model, the page and the ledger.
        data: the examples.
        forget: those to forget: ``{column: value or values}``, or ``{random: how many}``.
        model: what forgets.
        learn: teach the model all examples first; without it the model is taken as knowing them.
        reference: ``retrain``: teach a second model, alike, all but what is to be forgotten; a folder or id: that one.
        eraser: its name or spec.
        batch: rows at a time.
        seed: of the erasure and the audit.
        relearning: fields of :class:`~vestige.evidence.erasure.relearn.Relearning`.
        rows: of each set that the audit looks at, at most.
    """

    out: Path
    data: Data
    forget: dict[str, Any] = pydantic.Field(min_length=1, max_length=1)
    model: Model
    learn: Learning | None = None
    reference: str | None = None
    eraser: dict[str, Any]
    batch: int = pydantic.Field(32, ge=1)
    seed: int = 0
    relearning: dict[str, Any] = {}
    rows: int = pydantic.Field(500, ge=1)

    @pydantic.field_validator("eraser", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _retraining_needs_a_recipe(self) -> Self:
        if self.reference == "retrain" and self.learn is None:
            raise ValueError("reference 'retrain' needs 'learn', which says how")
        return self


class Retaining(_Part):
    """Learners on a stream.

    Attributes:
        out: the folder for checkpoints, the page and the ledger.
        data: the examples.
        experiences: how many, of equally many classes each; or the classes of each; or the column by whose values a
            stream of questions is split.
        kind: of a stream of images: ``class`` or ``task``.
        blur: share of each experience's images that change places with other experiences', 0 to 1.
        model: what learns; every learner begins with it.
        learners: their specs, one after the other; what one is beside another is the point of the table.
        train: fields of transformers' ``TrainingArguments``.
        seed: of training.
    """

    out: Path
    data: Data
    experiences: int | list[list[int]] | str
    kind: Literal["class", "task"] = "class"
    blur: float = pydantic.Field(0.0, ge=0, le=1)
    model: Model
    learners: list[dict[str, Any] | str] = pydantic.Field(min_length=1)
    train: dict[str, Any] = {}
    seed: int = 0


T = TypeVar("T", bound=_Part)


def read_spec(kind: type[T], source: str | os.PathLike[str] | Mapping[str, Any] | T, **changes: Any) -> T:
    """A description from a YAML file or a mapping, with changes; relative paths in a file are relative to it.

    Raises:
        InputError: no such file.
        SpecError: no YAML, an unknown field, or a value that is not allowed; names field and value.
    """
    if isinstance(source, kind):
        return source
    assert isinstance(source, str | os.PathLike | Mapping)
    spec, base = read_description(kind, source, **changes)
    data: Data = spec.data  # type: ignore[attr-defined]
    if data.file is not None:
        data = data.model_copy(update={"file": base / data.file.expanduser()})
    out = Path(os.path.normpath(base / spec.out.expanduser()))  # type: ignore[attr-defined]
    return spec.model_copy(update={"out": out, "data": data})


def write_spec(spec: Erasing | Retaining, place: Path) -> None:
    """Keep a description in a file."""
    write_whole(place, yaml.safe_dump(json.loads(spec.model_dump_json()), sort_keys=False))


def differing(spec: Erasing | Retaining, place: Path, names: Iterable[str]) -> str | None:
    """The first of some fields in which a description differs from that kept in a file; ``None``: in none of them."""
    own, held = json.loads(spec.model_dump_json()), yaml.safe_load(place.read_text(encoding="utf-8"))
    return next((name for name in names if not isinstance(held, dict) or held.get(name) != own[name]), None)
