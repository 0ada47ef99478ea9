"""What a comparison compares: read from YAML or a mapping, and checked before anything runs."""

from __future__ import annotations

import itertools
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pydantic
import yaml

from vestige.core.spec import did_you_mean
from vestige.errors import SpecError

if TYPE_CHECKING:
    from vestige.evidence.compare.plan import Ask, Plan
    from vestige.evidence.tasks.task import Task

__all__ = ["Comparison", "Lines", "PlacedError", "lines_of", "read_spec"]

LISTS = ("models", "tasks", "methods", "seeds")


class Comparison(pydantic.BaseModel):
    """What every comparison has: methods x tasks x models x seeds. Every field may stand in the YAML file.

    There is a kind for each family of tasks; it says which methods and models they go with, and what else there is to
    say.

    Class attributes
        family: the tasks of the kind.
        about: what they are called.

    Attributes:
        seeds: of all that is drawn.
        device: see :func:`vestige.models.load`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, strict=True)

    family: ClassVar[type[Task]]
    about: ClassVar[str]

    models: tuple[Any, ...]
    tasks: tuple[Any, ...]
    methods: tuple[Any, ...]
    seeds: tuple[int, ...] = pydantic.Field((0, 1, 2), min_length=1)
    device: str = "auto"

    @pydantic.field_validator(*LISTS, mode="before")
    @classmethod
    def _listed(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """One may stand where several are allowed."""
        return tuple(value) if cls.several(str(info.field_name), value) else (value,)

    @classmethod
    def several(cls, name: str, value: Any) -> bool:
        """Whether what was given for a field is a list, and not one thing alone."""
        return isinstance(value, list | tuple | range)

    @pydantic.model_validator(mode="after")
    def _seeds_once(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise PlacedError(("seeds",), "field 'seeds' holds the same value twice")
        return self

    def each(self) -> Iterator[tuple[Any, Any, Any, int]]:
        """Every model, task, method and seed; model by model, task by task, seed by seed."""
        for model, task, seed, method in itertools.product(self.models, self.tasks, self.seeds, self.methods):
            yield model, task, method, seed

    @property
    def pairs(self) -> dict[str, Any]:
        """Models that were given as objects, by name: only this process has them."""
        return {}

    @abstractmethod
    def worker(self) -> Callable[[], Any]:
        """What makes a worker: an object with ``run(job)``, which gives a job's rows and does not raise."""

    @abstractmethod
    def plan(self, ask: Ask, lines: Lines) -> Plan:
        """Look at the models with the help of one worker, and say which cells there are.

        Raises:
            SpecError: a model cannot be had, or something is beyond it; with its line.
        """

    @classmethod
    @abstractmethod
    def again(cls, told: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Measure the cell that a row describes, and give its row of now.

        Raises:
            SpecError: its task or method is unknown here or of another version, or its model is another one now.
        """


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
        raise SpecError(f"{path} holds no fields; allowed: {', '.join(_kind_of(None).model_fields)}")
    return _build(data, Lines(str(path), root))


def lines_of(source: Any) -> Lines:
    """Where in a YAML file something stands, which has been read once already; nowhere for what is no file."""
    if not isinstance(source, str | os.PathLike):
        return Lines()
    return Lines(str(source), yaml.compose(Path(source).read_text(encoding="utf-8"), Loader=yaml.SafeLoader))


def _kind_of(tasks: Any) -> type[Comparison]:
    from vestige.evidence.compare.kinds import kind_of

    return kind_of(tasks)


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
    kind = _kind_of(data.get("tasks", ()))
    for name in data:
        if name not in kind.model_fields:
            raise SpecError(f"{lines.place((name,))}{_unknown(str(name), kind)}")
    try:
        return kind(**data)
    except PlacedError as error:
        raise SpecError(f"{lines.place(error.path)}{error.text}") from None
    except pydantic.ValidationError as error:
        raise SpecError(_explain(data, error, lines)) from None


def _unknown(name: str, kind: type[Comparison]) -> str:
    """What is wrong with a field that a kind does not have."""
    from vestige.evidence.compare.kinds import KINDS

    for other in KINDS:
        if name in other.model_fields:
            return f"field {name!r} goes with {other.about}; the tasks here are {kind.about}"
    return f"unknown field {name!r}; {did_you_mean(name, kind.model_fields)}"


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


class PlacedError(Exception):
    """Something wrong at a place of the description."""

    def __init__(self, path: tuple[Any, ...], text: str) -> None:
        super().__init__(text)
        self.path, self.text = path, text
