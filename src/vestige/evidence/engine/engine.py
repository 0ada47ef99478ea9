"""What an engine is: it runs jobs, one after the other or side by side, and gives back what each came to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Done", "Engine"]


@dataclass(frozen=True)
class Done:
    """A job that has ended: its rows, or ``None`` and the reason where every worker that took it died."""

    job: Any
    rows: list[dict[str, Any]] | None
    reason: str = ""


class Engine(Protocol):
    """Runs jobs with workers: objects with ``run(job)``, which gives a job's rows and does not raise."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of one worker."""

    def run(self, jobs: Iterable[Any]) -> Iterator[Done]:
        """Each job when it is done, in any order."""

    def close(self) -> None:
        """Let go of the workers."""
