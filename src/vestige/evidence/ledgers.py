"""Reading ledgers for a report: several files, rows of earlier versions brought up to date, broken lines counted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.core.ledger import Ledger
from vestige.errors import LedgerError, SpecError

__all__ = ["Read", "read_ledgers"]


@dataclass(frozen=True)
class Read:
    """What ledgers hold.

    Attributes:
        rows: each with the file that it stands in, as ``ledger``, in the order of the files.
        broken: lines that could not be read, by file, where there were any.
        repeated: rows left out because another file has the same key.
    """

    rows: tuple[dict[str, Any], ...]
    broken: dict[str, int]
    repeated: int

    @property
    def notes(self) -> list[str]:
        """What a reader should know of what is missing."""
        told = [f"{count} broken {_lines(count)} in {file} skipped" for file, count in self.broken.items()]
        return told + ([f"{self.repeated} rows stand in several files and count once"] if self.repeated else [])


def read_ledgers(paths: Iterable[str | os.PathLike[str]]) -> Read:
    """The rows of ledgers; a folder stands for its ``ledger.jsonl``.

    Raises:
        SpecError: no such file, a ledger of a version that cannot be read here (the reason is told), or no row at all.
    """
    rows: list[dict[str, Any]] = []
    broken: dict[str, int] = {}
    keys: set[str] = set()
    repeated = 0
    for given in paths:
        path = Path(given).expanduser()
        path = path / "ledger.jsonl" if path.is_dir() else path
        if not path.is_file():
            raise SpecError(f"no ledger {str(given)!r}")
        ledger = Ledger(path)
        try:
            for row in ledger.rows():
                key = row.get("key")
                if isinstance(key, str) and key in keys:
                    repeated += 1
                    continue
                if isinstance(key, str):
                    keys.add(key)
                rows.append({**row, "ledger": str(path)})
            if ledger.broken:
                broken[str(path)] = ledger.broken
        except LedgerError as error:
            raise SpecError(str(error)) from error
    if not rows:
        raise SpecError(f"there is no row in {', '.join(str(path) for path in paths)}{_but(broken)}")
    return Read(tuple(rows), broken, repeated)


def _but(broken: dict[str, int]) -> str:
    count = sum(broken.values())
    return f"; {count} {_lines(count)} cannot be read" if count else ""


def _lines(count: int) -> str:
    return "line" if count == 1 else "lines"
