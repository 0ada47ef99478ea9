"""Examples to forget or to keep: read row by row, checked, put into batches; never held whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vestige.errors import InputError, UnsupportedModelError
from vestige.weights.rows import IGNORED, accepted, by_number, label_count, predicts_tokens, within

__all__ = ["Examples", "Reader", "Row", "checked", "disjoint"]

Row = dict[str, Tensor]
Collate = Callable[[list[Row]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Reader:
    """How rows become batches for one model.

    Attributes:
        inputs: the name under which the first of an ``(input, label)`` pair goes to the model.
        causal: whether the model predicts next tokens.
        classes: how many labels there are; ``None`` where the model does not say.
        padding: the token id that fills up short rows.
        collate: puts rows together in place of the usual way.
        columns: what of a row is for the model; ``None`` for all of it.
    """

    inputs: str
    causal: bool
    classes: int | None
    padding: int
    collate: Collate | None
    columns: frozenset[str] | None = None

    @classmethod
    def of(cls, model: nn.Module, collate: Collate | None) -> Reader:
        """What a model says of itself.

        Raises:
            UnsupportedModelError: an encoder-decoder model.
        """
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} is an encoder-decoder; erasers know classifiers and causal language models"
            )
        padding = getattr(config, "pad_token_id", None)
        padding = padding if isinstance(padding, int) and padding >= 0 else 0
        name = getattr(model, "main_input_name", "pixel_values")
        columns = accepted(model) if collate is None else None
        return cls(name, predicts_tokens(model), label_count(model), padding, collate, columns)

    def row(self, found: Any, where: str) -> Row:
        """A row of a dataset as tensors, with ``labels``."""
        if isinstance(found, Sequence) and not isinstance(found, str) and len(found) == 2:
            found = {self.inputs: found[0], "labels": found[1]}
        if not isinstance(found, Mapping):
            raise InputError(f"{where} is a {type(found).__name__}; allowed: a mapping, or (input, label)")
        taken = found.keys() if self.columns is None else found.keys() & self.columns
        row = {key: torch.as_tensor(found[key]) for key in found if key in taken}
        if "labels" not in row and "label" in row:
            row["labels"] = row.pop("label")
        if "labels" not in row and self.causal and "input_ids" in row:
            held = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
            row["labels"] = row["input_ids"].masked_fill(~held, IGNORED)
        if "labels" not in row:
            raise InputError(f"{where} has no 'labels'; it has {', '.join(sorted(found))}")
        return row

    def check(self, row: Row, where: str) -> None:
        """Refuse labels that the model does not know, and rows in which nothing counts."""
        labels = row["labels"]
        if labels.is_floating_point() or labels.ndim > 1:
            raise InputError(
                f"{where}: labels are {labels.dtype} of shape {tuple(labels.shape)}; "
                "allowed: one whole number, or one per token"
            )
        shifted = labels[1:] if self.causal and labels.ndim else labels
        counts = shifted if labels.ndim == 0 else shifted[shifted != IGNORED]
        if not counts.numel():
            raise InputError(f"{where}: no label counts, all are {IGNORED}")
        within(counts, self.classes, where, "label")
        if self.causal and "input_ids" in row:
            within(row["input_ids"], self.classes, where, "token")

    def batch(self, rows: list[Row], device: torch.device) -> Row:
        """Rows put together on a device; sequences of token ids are filled up on the right."""
        if self.collate is not None:
            made = dict(self.collate(rows))
        else:
            made = _padded(rows, self.padding) if "input_ids" in rows[0] else _stacked(rows)
        batch = {key: torch.as_tensor(value).to(device) for key, value in made.items()}
        if self.causal and batch["labels"].ndim == 2:
            labels = batch["labels"].clone()
            labels[:, 0] = IGNORED  # nothing predicts the first token of a row, wherever padding puts it
            if "attention_mask" in batch:
                labels[:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, IGNORED)
            batch["labels"] = labels
        return batch


class Examples:
    """Rows of a map-style dataset.

    Args:
        source: any object with a length and rows by number.
        name: what it is called in errors.
        reader: how its rows are read.
        numbers: only these rows, in this order.
    """

    def __init__(self, source: Any, name: str, reader: Reader, numbers: Sequence[int] | None = None) -> None:
        self.source, self.name, self.reader = by_number(source, name), name, reader
        self.numbers = range(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> Row:
        number = self.numbers[place]
        return self.reader.row(self.source[number], f"row {number} of {self.name}")

    def batches(
        self, size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Row]]:
        """Places of rows (rows,) and the rows, in order, or in one that a generator draws."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for places in order.split(size):
            yield places, self.reader.batch([self.row(int(n)) for n in places], device)

    def forever(self, size: int, device: torch.device, generator: torch.Generator) -> Iterator[Row]:
        """Batches without end, every row once before any comes again."""
        while True:
            for _, batch in self.batches(size, device, generator):
                yield batch

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """The rows without a share drawn at random, and that share (at least one row).

        Raises:
            InputError: there are fewer than two rows.
        """
        if len(self) < 2:
            raise InputError(f"{self.name} has {len(self)} row, and one has to be held out; give more, or held_out")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        most = max(1, round(share * len(self)))
        picked = [sorted(self.numbers[n] for n in part) for part in (order[most:], order[:most])]
        return tuple(Examples(self.source, self.name, self.reader, part) for part in picked)  # type: ignore[return-value]


def checked(examples: Examples) -> dict[bytes, int]:
    """Look at every row once; fingerprints of the inputs with the number of a row that has it.

    Raises:
        InputError: there are no rows, or labels are out of range.
    """
    if not len(examples):
        raise InputError(f"{examples.name} has no rows")
    found: dict[bytes, int] = {}
    stacked = examples.reader.collate is None
    first: Row = {}
    for place in range(len(examples)):
        row = examples.row(place)
        where = f"row {examples.numbers[place]} of {examples.name}"
        examples.reader.check(row, where)
        first = first or row
        if stacked and "input_ids" not in row:
            _alike(row, first, where)
        found.setdefault(_fingerprint(row), examples.numbers[place])
    return found


def disjoint(forget: Examples, *others: Examples) -> None:
    """Look at every row of all sets once, and refuse rows to forget that stand in another set too.

    Raises:
        InputError: a set overlaps with the first, is empty, or has labels out of range.
    """
    marks = checked(forget)
    for examples in others:
        both = [(marks[mark], number) for mark, number in checked(examples).items() if mark in marks]
        if both:
            raise InputError(
                f"{forget.name} and {examples.name} overlap in {len(both)} examples, "
                f"such as row {both[0][0]} of {forget.name} and row {both[0][1]} of {examples.name}"
            )


def _fingerprint(row: Row) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(row.keys() - {"labels", "attention_mask"}):
        value = row[key]
        wide = value.double() if value.is_floating_point() else value.long()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(wide.contiguous().cpu().numpy().tobytes())
    return digest.digest()


def _alike(row: Row, first: Row, where: str) -> None:
    """Refuse a row that cannot be stacked on the first of its set."""
    shapes, others = ({key: tuple(value.shape) for key, value in each.items()} for each in (row, first))
    for key in shapes.keys() | others.keys():
        if shapes.get(key) != others.get(key):
            raise InputError(
                f"{where}: {key} is {shapes.get(key, 'absent')}, where the first row has {others.get(key, 'none')}; "
                "give rows of one shape, or a collate that puts them together"
            )


def _stacked(rows: list[Row]) -> Row:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _padded(rows: list[Row], padding: int) -> Row:
    longest = max(len(row["input_ids"]) for row in rows)
    rows = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    fill = {"input_ids": padding, "labels": IGNORED}

    def wide(row: Row, key: str) -> Tensor:
        value = row[key]
        if value.ndim != 1 or len(value) != len(row["input_ids"]):
            return value  # one label of the whole row
        return torch.nn.functional.pad(value, (0, longest - len(value)), value=fill.get(key, 0))

    return {key: torch.stack([wide(row, key) for row in rows]) for key in rows[0]}
