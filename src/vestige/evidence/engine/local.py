"""The engine that needs nothing: one job after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vestige.evidence.engine.engine import Done

__all__ = ["LocalEngine"]


class LocalEngine:
    """Runs jobs with one worker.

    Args:
        make_worker: makes what runs them: an object with ``run(job)``, which gives a job's rows.
    """

    def __init__(self, make_worker: Callable[[], Any]) -> None:
        self.worker = make_worker()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the worker."""
        return getattr(self.worker, method)(*arguments)

    def run(self, jobs: Iterable[Any]) -> Iterator[Done]:
        """Each job with its rows, when it is done."""
        for job in jobs:
            yield Done(job, self.worker.run(job))

    def close(self) -> None:
        """Let go of the worker."""
        del self.worker
