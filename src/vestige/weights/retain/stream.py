"""A stream of experiences: what a model is to learn, one part after the other."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from vestige.core.method import did_you_mean
from vestige.errors import InputError, SpecError
from vestige.weights.rows import by_number, within

__all__ = ["Experience", "Kind", "Rows", "Stream"]

Kind = Literal["class", "domain", "task"]
KINDS = ("class", "domain", "task")


class Rows(Dataset):
    """Some rows of a map-style dataset, each as a mapping that also says which row it is.

    Args:
        source: a ``datasets.Dataset``, or any object with a length and rows by number; a row is a mapping of what the
            model takes, or a pair of input and label.
        rows: the numbers of the rows, in order.
        task: number of the experience that the rows belong to.
        inputs: the name under which the first of a pair goes to the model.
        without: a column that is not for the model.
        label: the column that the model is given as ``labels``; if ``None``, ``labels`` or ``label``.
    """

    def __init__(
        self,
        source: Any,
        rows: Sequence[int] | np.ndarray,
        task: int,
        inputs: str,
        without: str | None = None,
        label: str | None = None,
    ) -> None:
        self.source, self.inputs, self.task, self.without, self.label = source, inputs, task, without, label
        self.rows = np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = int(self.rows[place])
        return {**self.example(row), "index": row, "task": self.task}

    def example(self, row: int) -> dict[str, Any]:
        """A row, by its number in the dataset, as what the model takes."""
        found = self.source[row]
        if isinstance(found, Mapping):
            example = {name: value for name, value in found.items() if name != self.without}
            label = self.label or ("labels" if "labels" in example else "label")
            if label in example:
                example["labels"] = example.pop(label)
            return example
        if isinstance(found, Sequence) and len(found) == 2:
            try:
                return {self.inputs: found[0], "labels": operator.index(found[1])}
            except TypeError:
                raise InputError(
                    f"row {row} of the dataset has the label {found[1]!r}; allowed: a whole number"
                ) from None
        raise InputError(f"row {row} of the dataset is a {type(found).__name__}; allowed: a mapping, or (input, label)")

    def check(self, count: int | None) -> None:
        """Refuse labels that a model does not know, where they can be read without the rows.

        Args:
            count: how many labels the model knows; ``None`` for any.

        Raises:
            InputError: one is out of range.
        """
        tensors = getattr(self.source, "tensors", None)
        column = (getattr(self.source, "features", None) or {}).get(self.label or "labels")
        if tensors is not None:
            labels = torch.as_tensor(tensors[-1])
        elif str(getattr(column, "dtype", "")).startswith("int"):
            labels = torch.as_tensor(np.asarray(self.source[self.label or "labels"]))
        else:
            return
        if labels.ndim == 1 and not labels.is_floating_point():
            own = labels[torch.from_numpy(self.rows)]
            wrong = (own < 0) if count is None else (own < 0) | (own >= count)
            if bool(wrong.any()):
                place = int(wrong.nonzero()[0])
                within(own[place], count, f"row {self.rows[place]} of the dataset", "label")


@dataclass(frozen=True, eq=False)
class Experience:
    """One part of a stream.

    Attributes:
        index: its place, from 0.
        name: what it is called in tables and figures.
        train, test: its rows.
        classes: the labels that it is about; ``None`` where the stream is not split by class.
    """

    index: int
    name: str
    train: Rows
    test: Rows
    classes: tuple[int, ...] | None = None


class Stream(Sequence[Experience]):
    """Experiences in the order in which they are learnt.

    ``kind`` says what the model is told when it is asked: in a ``"class"`` stream each experience brings labels that
    are new, and an answer is one of all of the stream; in a ``"task"`` stream the answer is one of the labels of the
    experience, which is known; in a ``"domain"`` stream the labels (or the tokens) are the same throughout and the
    inputs change.

    Build one with :meth:`of`, :meth:`by_class` or :meth:`by_column`.
    """

    def __init__(self, experiences: Sequence[Experience], kind: Kind) -> None:
        if kind not in KINDS:
            raise SpecError(f"parameter 'kind' is {kind!r}; {did_you_mean(str(kind), KINDS)}")
        if not experiences:
            raise InputError("the stream has no experiences")
        for experience in experiences:
            for part in ("train", "test"):
                if not len(getattr(experience, part)):
                    raise InputError(f"experience {experience.index} ({experience.name}) has no {part} examples")
            if kind == "task" and experience.classes is None:
                raise InputError(f"a task stream needs the classes of experience {experience.index}, which has none")
        self.experiences, self.kind = tuple(experiences), kind

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[Any, Any]] | Mapping[str, tuple[Any, Any]],
        *,
        kind: Kind = "domain",
        classes: Sequence[Sequence[int]] | None = None,
        inputs: str = "pixel_values",
    ) -> Stream:
        """A stream from pairs of training and test datasets, by name or in order.

        Args:
            parts: each a pair of map-style datasets.
            kind: see the class.
            classes: the labels of each part; needed where ``kind`` is ``"task"``.
            inputs: the name under which inputs of ``(input, label)`` rows go to the model.

        Raises:
            InputError: no parts, or one without examples or rows by number; other numbers of parts and of ``classes``.
        """
        named = dict(parts) if isinstance(parts, Mapping) else {str(n): pair for n, pair in enumerate(parts)}
        if classes is not None and len(classes) != len(named):
            raise InputError(f"{len(named)} parts, but the classes of {len(classes)}")
        experiences = []
        for index, (name, pair) in enumerate(named.items()):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"part {name} is a {type(pair).__name__}; allowed: a training and a test dataset")
            train, test = (by_number(data, f"part {name}") for data in pair)
            rows = Rows(train, range(len(train)), index, inputs)
            asked = Rows(test, range(len(test)), index, inputs)
            labels = None if classes is None else tuple(sorted({int(label) for label in classes[index]}))
            experiences.append(Experience(index, name, rows, asked, labels))
        return cls(experiences, kind)

    @classmethod
    def by_class(
        cls,
        train: Any,
        test: Any,
        *,
        experiences: int | Sequence[Sequence[int]],
        kind: Kind = "class",
        blur: float = 0.0,
        seed: int | None = None,
        label: str = "labels",
        inputs: str = "pixel_values",
    ) -> Stream:
        """Split one labelled dataset by class.

        Args:
            train: a map-style dataset.
            test: another, with the same classes.
            experiences: how many, of equally many classes each; or the classes of each.
            kind: ``"class"``, or ``"task"`` where the experience is known when the model is asked; ``"domain"`` where
                neither is wanted.
            blur: share of each experience's training examples that change places with other experiences', so that
                boundaries are not sharp; 0 to 1.
            seed: of the order of the classes (``None``: ascending) and of the blur.
            label: name of the column with labels.
            inputs: the name under which inputs of ``(input, label)`` rows go to the model.

        Raises:
            InputError: an experience would have no examples, a class stands in two, a label is negative, or a dataset
                has no rows by number.
            SpecError: ``blur`` or ``experiences`` is out of range.
        """
        _check_blur(blur)
        known, asked = labels_of(by_number(train, "train"), label), labels_of(by_number(test, "test"), label)
        groups = _groups(known, experiences, seed)
        owner = {c: n for n, group in enumerate(groups) for c in group}
        home = np.array([owner.get(int(c), -1) for c in known])
        if blur:
            home = _blurred(home, blur, np.random.default_rng(0 if seed is None else seed))
        parts = [
            Experience(
                index=n,
                name=",".join(map(str, group)),
                train=Rows(train, np.flatnonzero(home == n), n, inputs, label=label),
                test=Rows(test, np.flatnonzero(np.isin(asked, group)), n, inputs, label=label),
                classes=group,
            )
            for n, group in enumerate(groups)
        ]
        return cls(parts, kind)

    @classmethod
    def by_column(
        cls,
        train: Any,
        test: Any,
        column: str,
        *,
        order: Sequence[Any] | None = None,
        blur: float = 0.0,
        seed: int = 0,
        inputs: str = "pixel_values",
    ) -> Stream:
        """A domain stream from one dataset, split by the value of a column.

        Args:
            train: a map-style dataset with the column.
            test: another.
            column: its name; it is not handed to the model.
            order: the values in the order of the stream; sorted if ``None``.
            blur: share of each experience's training examples that change places with other experiences'; 0 to 1.
            seed: of the blur.
            inputs: see :meth:`of`.

        Raises:
            InputError: there is no such column, or a value has no examples.
            SpecError: ``blur`` is out of range.
        """
        _check_blur(blur)
        here, there = (_column(by_number(data, name), column) for data, name in ((train, "train"), (test, "test")))
        values = sorted(set(here)) if order is None else list(order)
        places = {value: n for n, value in enumerate(values)}
        home, asked = (np.array([places.get(value, -1) for value in found]) for found in (here, there))
        if blur:
            home = _blurred(home, blur, np.random.default_rng(seed))
        parts = []
        for n, value in enumerate(values):
            pair = [
                Rows(data, np.flatnonzero(where == n), n, inputs, without=column)
                for data, where in ((train, home), (test, asked))
            ]
            parts.append(Experience(n, str(value), *pair))
        return cls(parts, "domain")

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: Any) -> Any:
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    @property
    def names(self) -> list[str]:
        return [experience.name for experience in self.experiences]

    @property
    def classes(self) -> tuple[int, ...]:
        """All labels of a stream that is split by class, ascending; none of another."""
        return tuple(sorted({c for e in self.experiences for c in e.classes or ()}))

    def seen(self, index: int) -> tuple[int, ...]:
        """The labels of the experiences up to one, ascending."""
        return tuple(sorted({c for e in self.experiences[: index + 1] for c in e.classes or ()}))

    def describe(self) -> dict[str, Any]:
        """The stream in plain types: for ledgers, and to tell whether a run is taken up with the same one."""
        return {
            "name": f"{self.kind}-incremental",
            "experiences": [
                {"name": e.name, "train": len(e.train), "test": len(e.test), "classes": e.classes}
                for e in self.experiences
            ],
        }

    def __repr__(self) -> str:
        return f"Stream({self.kind}, {len(self)} experiences: {', '.join(self.names)})"


def labels_of(dataset: Any, label: str = "labels") -> np.ndarray:
    """The labels (n,) of a dataset, read from its column where it has one, else row by row.

    Raises:
        InputError: the rows hold no whole numbers under that name.
    """
    tensors, columns = getattr(dataset, "tensors", None), getattr(dataset, "column_names", None)
    if columns and label not in columns:
        raise InputError(f"parameter 'label': the dataset has no column {label!r}; {did_you_mean(label, columns)}")
    try:
        if columns:
            found = np.asarray(dataset[label])
        elif tensors is not None:
            found = np.asarray(tensors[-1])
        else:
            rows = (dataset[n] for n in range(len(dataset)))
            found = np.asarray([int(r[label] if isinstance(r, Mapping) else r[1]) for r in rows])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"the dataset's rows hold no label under {label!r}: {error}") from None
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or (len(found) and found.min() < 0):
        raise InputError(f"labels under {label!r} must be whole numbers from 0, one per row; dtype {found.dtype}")
    return found


def _column(dataset: Any, column: str) -> list[Any]:
    names = getattr(dataset, "column_names", None)
    if names is not None:
        if column not in names:
            raise InputError(f"the dataset has no column {column!r}; {did_you_mean(column, names)}")
        return list(dataset[column])
    rows: Iterable[Any] = (dataset[n] for n in range(len(dataset)))
    found = [row.get(column) if isinstance(row, Mapping) else None for row in rows]
    if any(value is None for value in found):
        raise InputError(f"not every row of the dataset has {column!r}")
    return [value.item() if isinstance(value, torch.Tensor) else value for value in found]


def _groups(labels: np.ndarray, experiences: Any, seed: int | None) -> list[tuple[int, ...]]:
    present = np.unique(labels)
    if isinstance(experiences, int) and not isinstance(experiences, bool):
        if not 1 <= experiences <= len(present):
            raise SpecError(f"parameter 'experiences' is {experiences}; allowed: 1 to {len(present)}, one class each")
        order = present if seed is None else np.random.default_rng(seed).permutation(present)
        return [tuple(sorted(int(c) for c in part)) for part in np.array_split(order, experiences)]
    if (
        isinstance(experiences, str)
        or not isinstance(experiences, Iterable)
        or any(isinstance(group, str) or not isinstance(group, Iterable) for group in experiences)
    ):
        raise SpecError(f"parameter 'experiences' is {experiences!r}; allowed: a whole number, or the classes of each")
    groups = [tuple(sorted({int(c) for c in group})) for group in experiences]
    every = [c for group in groups for c in group]
    if len(set(every)) < len(every):
        raise InputError(f"a class stands in two experiences: {groups}")
    absent = sorted(set(every) - set(present.tolist()))
    if absent:
        raise InputError(f"no training example has the label {absent[0]}")
    return groups


def _check_blur(blur: float) -> None:
    if not 0.0 <= blur <= 1.0:
        raise SpecError(f"parameter 'blur' is {blur!r}; allowed: 0 to 1")


def _blurred(home: np.ndarray, blur: float, draw: np.random.Generator) -> np.ndarray:
    """Let a share of each experience's examples change places at random; sizes stay as they are."""
    parts = [np.flatnonzero(home == n) for n in range(home.max() + 1)]
    chosen = np.concatenate([draw.permutation(part)[: round(blur * len(part))] for part in parts])
    mixed = home.copy()
    mixed[chosen] = home[draw.permutation(chosen)]
    return mixed
