"""The record of a run: the rows that its ledger has, those that are added, and how much is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vestige.core.ledger import Ledger
from vestige.errors import LedgerError

__all__ = ["Advance", "Record", "cell_key", "progress_bar"]

Advance = Callable[[float, str], None]
"""Tells a progress bar how much work was done, and what comes next."""


class Record:
    """A ledger with what is known of it: cells by their keys.

    Attributes:
        ledger: the file.
        known: the rows by key, those added here among them.
        measured: how many were added here.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(path)
        self.known: dict[str, dict[str, Any]] = {
            row["key"]: row for row in self.ledger.rows() if isinstance(row.get("key"), str)
        }
        self.measured = 0

    def store(self, key: str, **row: Any) -> None:
        """Append a row, and know it. Another run on the same ledger may have been faster: then its row stands."""
        try:
            self.ledger.append(row, key=key)
            self.measured += 1
        except LedgerError:
            if not self.ledger.has(key):
                raise
        self.known[key] = row


def cell_key(kind: str, **what: Any) -> str:
    """The ledger key of a measurement: its kind, and a hash of all that it depends on."""
    text = json.dumps(what, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@contextmanager
def progress_bar(name: str, total: float, show: bool = True) -> Iterator[Advance]:
    """A progress bar on stderr with the time left; ``total`` is in any unit of work."""
    if not show:
        yield lambda work, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # The speed is that of the last half hour, not of the last seconds: work comes in large pieces.
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=1800) as bar:
        task = bar.add_task(name, total=total)
        yield lambda work, what: bar.update(task, advance=work, description=what)
