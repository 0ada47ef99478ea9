"""What the scripts share that write tables into pages: a table in Markdown, results, and a table's place in a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Rows", "put", "rows_of", "table", "update"]

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]


def rows_of(place: Path) -> Rows:
    """The rows of a result, one document, or of a ledger, one a line; none where it was not run."""
    if not place.is_file():
        return []
    text = place.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if place.suffix == ".jsonl" else json.loads(text)["rows"]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table, line by line."""
    rows = [f"| {' | '.join(cells)} |" for cells in (heads, *lines)]
    return [rows[0], "|" + "---|" * len(heads), *rows[1:]]


def put(page: str, name: str, lines: Sequence[str]) -> str:
    """A page with some lines between the marks of a name, where it has such marks."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in page:
        return page
    before, _, rest = page.partition(begin)
    return "\n".join([before + begin, "", *lines, "", end]) + rest.partition(end)[2]


def update(pages: Sequence[Path], written: Callable[[str], str]) -> None:
    """Pages with their tables of now."""
    for place in pages:
        place.write_text(written(place.read_text(encoding="utf-8")), encoding="utf-8")
