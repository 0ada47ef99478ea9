"""What a comparison compares: read from YAML or a mapping, and checked before anything runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from vestige.context.evict.full import Full
from vestige.context.policy import CachePolicy
from vestige.core.method import did_you_mean
from vestige.errors import SpecError
from vestige.evidence.amounts import Amount, Unit
from vestige.evidence.budgets import label
from vestige.evidence.tasks.task import ContextTask

__all__ = ["Comparison", "Lines", "lines_of", "read_spec"]

Equal = Literal["bytes", "entries", "time"]
UNITS: dict[str, tuple[Unit, ...]] = {
    "bytes": ("share", "bytes"),
    "entries": ("share", "entries"),
    "time": ("share", "seconds"),
}


class Comparison(pydantic.BaseModel):
    """Methods x budgets x tasks x models x seeds. Every field may stand in the YAML file.

    Attributes:
        models: what :func:`vestige.models.load` takes; from Python also pairs of a model and its tokenizer.
        tasks: tasks that read a context, by name or spec.
        methods: cache policies, by name or spec; ``full`` is always among them, as the measure of the others.
        budgets: what a method may use: shares (``0.25``) of what the full cache takes, or amounts (see ``equal``).
        equal: what the methods get equal amounts of: ``bytes`` held per context (a budget is a share, or ``"4MB"``),
            ``entries`` per head (a share, or a whole number), or ``time`` per decoded token (a share, or ``"5ms"``).
            Each method's own parameter is worked out from that. One that has none runs once, as it stands.
        seeds: of the tasks' examples.
        examples: per task and seed.
        batch: examples that run together.
        question_known: whether a method sees the question before it drops anything.
        timed: tokens that are decoded to measure seconds per token; 0 measures no time.
        device, dtype: see :func:`vestige.models.load`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, strict=True)

    models: tuple[Any, ...] = pydantic.Field(min_length=1)
    tasks: tuple[ContextTask, ...] = pydantic.Field(min_length=1)
    methods: tuple[CachePolicy, ...] = pydantic.Field(min_length=1)
    budgets: tuple[Amount, ...] = (Amount(0.25, "share"), Amount(0.5, "share"))
    equal: Equal = "bytes"
    seeds: tuple[int, ...] = pydantic.Field((0, 1, 2), min_length=1)
    examples: int = pydantic.Field(5, ge=1)
    batch: int = pydantic.Field(5, ge=1)
    question_known: bool = False
    timed: int = pydantic.Field(8, ge=0)
    device: str = "auto"
    dtype: str = "auto"

    @pydantic.field_validator("models", "tasks", "methods", "budgets", "seeds", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """One may stand where several are allowed."""
        several = isinstance(value, list | tuple | range) and not (info.field_name == "models" and _is_pair(value))
        values = tuple(value) if several else (value,)
        return tuple(Amount.of(item) for item in values) if info.field_name == "budgets" else values

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
    def _consistent(self) -> Comparison:
        for place, budget in enumerate(self.budgets):
            if budget.unit not in UNITS[self.equal]:
                raise _PlacedError(
                    ("budgets", place),
                    f"budget {budget} in a comparison at equal {self.equal}; "
                    f"allowed: {' or '.join(UNITS[self.equal])} (a share is a number with a decimal point)",
                )
        for name in ("seeds", "budgets"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise _PlacedError((name,), f"field {name!r} holds the same value twice")
        if self.equal == "time" and self.timed < 1:
            raise _PlacedError(("timed",), "field 'timed' is 0; a comparison at equal time has to decode some tokens")
        return self


def read_spec(source: str | os.PathLike[str] | Mapping[str, Any] | Comparison) -> Comparison:
    """A comparison from a YAML file or a mapping.

    Raises:
        SpecError: no such file, no YAML, an unknown field, or a value that is not allowed; with its file and line.
    """
    if isinstance(source, Comparison):
        return source
    if isinstance(source, Mapping):
        return _build(dict(source), Lines())
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise SpecError(f"{os.fspath(source)!r} cannot be read: {reason}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds no fields; allowed: {', '.join(Comparison.model_fields)}")
    return _build(data, Lines(str(path), root))


def lines_of(path: str | os.PathLike[str]) -> Lines:
    """Where in a YAML file something stands; the file has been read once already."""
    return Lines(str(path), yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader))


class Lines:
    """Where in a YAML file something stands."""

    def __init__(self, file: str = "", root: yaml.Node | None = None) -> None:
        self.file = file
        self._root = root
        self._at = dict(_places(root, ())) if root is not None else {}

    def place(self, path: tuple[Any, ...]) -> str:
        """``file:line: `` of the innermost part of ``path`` that is there, or nothing where there is no file."""
        while path and path not in self._at:
            path = path[:-1]
        return f"{self.file}:{self._at[path]}: " if path in self._at else f"{self.file}: " if self.file else ""

    def of_value(self, field: str, value: str) -> str:
        """``file:line: `` of a value in a list, or alone, under a field."""
        pairs = self._root.value if isinstance(self._root, yaml.MappingNode) else ()
        nodes = [node for key, node in pairs if key.value == field]
        items = [item for node in nodes for item in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
        found = [item.start_mark.line + 1 for item in items if getattr(item, "value", None) == value]
        return f"{self.file}:{found[0]}: " if found else self.place((field,))


def _places(node: yaml.Node, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inside = (*path, key.value)
            yield from _places(value, inside)
            yield inside, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield (*path, place), item.start_mark.line + 1
            yield from _places(item, (*path, place))


def _build(data: dict[str, Any], lines: Lines) -> Comparison:
    for name in data:
        if name not in Comparison.model_fields:
            place = lines.place((name,))
            raise SpecError(f"{place}unknown field {name!r}; {did_you_mean(str(name), Comparison.model_fields)}")
    try:
        return Comparison(**data)
    except _PlacedError as error:
        raise SpecError(f"{lines.place(error.path)}{error.text}") from None
    except pydantic.ValidationError as error:
        raise SpecError(_explain(data, error, lines)) from None


def _explain(data: dict[str, Any], error: pydantic.ValidationError, lines: Lines) -> str:
    """The first thing wrong, in one line that begins with its place in the file."""
    first = error.errors()[0]
    path, cause = tuple(first["loc"]), first.get("ctx", {}).get("error")
    if not isinstance(cause, SpecError):
        if first["type"] == "missing":
            return f"{lines.place(())}field {path[0]!r} is missing"
        return f"{lines.place(path)}field {'.'.join(map(str, path))!r} is {first['input']!r}: {first['msg']}"
    text = str(cause)
    if len(path) == 1 and isinstance(listed := data.get(str(path[0])), list):  # found while the list was read
        named = [place for place, item in enumerate(listed) if repr(item) in text]
        path = (*path, named[0]) if named else path
    if parameter := re.search(r"parameter '(\w+)'", text):
        path = (*path, parameter[1])
    return f"{lines.place(path)}{_kind(path)}{text}"


def _kind(path: tuple[Any, ...]) -> str:
    """What was looked for, where the error's own words speak of methods in general."""
    return "in tasks: " if path[:1] == ("tasks",) else ""


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not any(isinstance(part, str) for part in value)


class _PlacedError(Exception):
    """Something wrong at a place of the description."""

    def __init__(self, path: tuple[Any, ...], text: str) -> None:
        super().__init__(text)
        self.path, self.text = path, text
