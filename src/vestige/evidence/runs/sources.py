"""Examples of a run: images with labels, or questions with answers, and which of them are to be forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.method import did_you_mean
from vestige.errors import InputError, SpecError
from vestige.evidence.runs.spec import Data

__all__ = ["Examples", "Sets", "chosen", "encoded", "examples"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """What there is to learn, and what never is.

    Attributes:
        kind: ``"images"`` or ``"text"``.
        train: rows with what the model takes and the columns by which rows are chosen; text rows have ``question``,
            ``answer`` and perhaps ``paraphrase``.
        test: rows that no model is taught.
        classes: of images.
    """

    kind: str
    train: Sequence[Row]
    test: Sequence[Row]
    classes: int = 0


@dataclass(frozen=True)
class Sets:
    """Rows of an erasure; ``learnt`` are all that a model is taught beforehand."""

    forget: list[Row]
    retain: list[Row]
    unseen: list[Row]
    paraphrases: list[Row]

    @property
    def learnt(self) -> list[Row]:
        return [*self.forget, *self.paraphrases, *self.retain]


def examples(data: Data) -> Examples:
    """Read what a description names.

    Raises:
        MissingPackageError: a package is absent.
        InputError: a file cannot be read, or lacks what it should hold.
        SpecError: unknown fields.
    """
    if data.name == "digits":
        from vestige.evidence.data.digits import digits

        train, test = (_images(*part.tensors) for part in digits(data.seed, train=data.limit or 1000, test=400))
        return Examples("images", train, test, classes=10)
    if data.name == "fashion-mnist":
        from vestige.evidence.data.fashion import fashion

        train, test = (_images(*part.tensors) for part in fashion(data.seed, train=data.limit or 5000, test=1000))
        return Examples("images", train, test, classes=10)
    if data.name == "npz":
        return _own_images(data)
    rows = _lines(data.file) if data.name == "jsonl" else _facts(data)  # type: ignore[arg-type]
    # A subject is either taught as a whole or not at all.
    subjects = list(dict.fromkeys(str(row.get("subject", row["question"])) for row in rows))[: data.limit]
    order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(data.seed)).tolist()
    aside = {subjects[n] for n in order[: max(1, round(data.unseen * len(subjects)))]}
    used = [row for row in rows if str(row.get("subject", row["question"])) in set(subjects)]
    train, test = (
        [r for r in used if (str(r.get("subject", r["question"])) in aside) == held] for held in (False, True)
    )
    return Examples("text", train, test)


def _images(images: Tensor, labels: Tensor) -> list[Row]:
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


def _own_images(data: Data) -> Examples:
    assert data.file is not None
    try:
        with np.load(data.file, allow_pickle=False) as file:
            held = {name: file[name] for name in ("images", "labels", "test_images", "test_labels")}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{data.file} cannot be read: {error}") from error
    parts = []
    for images, labels in ((held["images"], held["labels"]), (held["test_images"], held["test_labels"])):
        if images.ndim != 4 or labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(
                f"{data.file}: images of shape {images.shape} and labels of shape {labels.shape}, {labels.dtype}; "
                "allowed: (rows, channels, height, width), and one whole number for each"
            )
        few = slice(data.limit)
        parts.append(_images(torch.tensor(images[few], dtype=torch.float32), torch.tensor(labels[few])))
    return Examples("images", parts[0], parts[1], classes=int(held["labels"].max()) + 1)


def _facts(data: Data) -> list[Row]:
    from vestige.evidence.data import facts

    found = facts.elements() if data.name == "elements" else facts.countries()
    known = list(dict.fromkeys(fact.field for fact in found))
    for field in data.fields or ():
        if field not in known:
            raise SpecError(f"field 'data.fields' holds {field!r}; {did_you_mean(field, known)}")
    return [vars(fact) for fact in found if data.fields is None or fact.field in data.fields]


def _lines(path: Path) -> list[Row]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise InputError(f"{path}, line {number}: allowed: an object with the texts 'question' and 'answer'")
        rows.append(row)
    if len(rows) < 4:
        raise InputError(f"{path} holds {len(rows)} lines; allowed: four or more")
    return rows


def chosen(found: Examples, forget: dict[str, Any], seed: int, encode: Callable[[Row, str], Row]) -> Sets:
    """Split the examples by what is to be forgotten, as rows that models take.

    Args:
        found: the examples.
        forget: one column with a value or values, or ``random`` with a number.
        seed: of a random choice.
        encode: makes a row for the model of an example and the wording (``question`` or ``paraphrase``).

    Raises:
        SpecError: no such column, or a number out of range.
        InputError: no example, or all of them, have such a value.
    """
    ((column, wanted),) = forget.items()
    if column == "random":
        if type(wanted) is not int or not 0 < wanted < len(found.train):
            raise SpecError(f"field 'forget.random' is {wanted!r}; allowed: 1 to {len(found.train) - 1}")
        order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
        picked, others = set(order), list(found.test)
    else:
        column = "labels" if found.kind == "images" and column == "label" else column
        columns = [name for name in found.train[0] if name != "pixel_values"]
        if column not in columns:
            raise SpecError(f"field 'forget' names {column!r}; {did_you_mean(column, [*columns, 'random'])}")
        values = wanted if isinstance(wanted, list) else [wanted]
        picked = {n for n, row in enumerate(found.train) if row[column] in values}
        held = {row[column] for n, row in enumerate(found.train) if n in picked}
        if missing := [value for value in values if value not in held]:
            aside = any(row.get(column) in missing for row in found.test)
            why = "it stands aside, as what is never taught (data.unseen, data.seed)" if aside else "none has it"
            raise InputError(f"forget: no example that is taught has {column} {missing[0]!r}: {why}")
        if len(picked) == len(found.train):
            raise InputError(f"forget: all {len(picked)} examples have {column} {wanted!r}")
        # Of the kind of what is forgotten: the same class; of facts, any that were not taught.
        others = [row for row in found.test if found.kind == "text" or row[column] in values]
    gone = [row for n, row in enumerate(found.train) if n in picked]
    kept = [row for n, row in enumerate(found.train) if n not in picked]
    if found.kind == "images":
        return Sets(gone, kept, others, [])
    again = [row for row in gone if row.get("paraphrase")]
    more = [encode(row, "paraphrase") for row in kept if row.get("paraphrase")]
    return Sets(
        [encode(row, "question") for row in gone],
        [*(encode(row, "question") for row in kept), *more],
        [encode(row, "question") for row in others],
        [encode(row, "paraphrase") for row in again],
    )


def encoded(tokenizer: Any) -> Callable[[Row, str], Row]:
    """How a question and its answer become tokens; only the answer is to be predicted."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def encode(row: Row, wording: str) -> Row:
        asked = tokenizer(str(row[wording]), add_special_tokens=True).input_ids
        if asked and end and asked[-1] == end[0]:
            asked = asked[:-1]
        said = tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids + end
        return {"input_ids": torch.tensor(asked + said), "labels": torch.tensor([-100] * len(asked) + said)}

    return encode
