"""What several verbs need: lists in options, JSON on the screen, tables of text."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from vestige.errors import SpecError

__all__ = ["amount", "listed", "print_json", "whole", "wrap"]

T = TypeVar("T")


def listed(option: str, text: str, convert: Callable[[str], T]) -> list[T]:
    """Read a comma-separated list.

    Raises:
        SpecError: an item that ``convert`` refuses, or no item at all; names the option.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    try:
        values = [convert(item) for item in items]
    except ValueError as error:
        raise SpecError(f"{option} is {text!r}: {error}") from None
    if not values:
        raise SpecError(f"{option} is {text!r}; allowed: values separated by commas")
    return values


def whole(text: str) -> int:
    """A whole number; for :func:`listed`."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def amount(text: str) -> int | float:
    """A whole number, or one with a decimal point; for :func:`listed`."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a whole number nor a fraction such as 0.25") from None


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def wrap(text: str, indent: int = 0) -> str:
    """A paragraph broken to the width of the terminal; left whole where the output is no terminal."""
    margin = " " * indent
    if not sys.stdout.isatty():
        return margin + text
    return textwrap.fill(text, shutil.get_terminal_size().columns, initial_indent=margin, subsequent_indent=margin)


def columns(rows: Iterable[tuple[str, ...]], indent: int = 2) -> str:
    """Rows of text, every column but the last as wide as its widest entry; lines cut to the terminal."""
    table = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)][:-1]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = []
    for row in table:
        cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=False)]
        line = " " * indent + "  ".join([*cells, row[-1]]).rstrip()
        lines.append(line if width is None or len(line) <= width else line[: width - 1] + "…")
    return "\n".join(lines)
