"""The same jobs on Ray: side by side on one machine or a cluster, with GPUs for each worker.

The driver alone writes the ledger, so workers need no common disk. A job whose worker dies goes to a new one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vestige.errors import EngineError, MissingPackageError, SpecError
from vestige.evidence.engine.engine import Done

__all__ = ["RayEngine", "check_ray"]

INSTALL = "pip install 'vestige[ray]'"
TRIES = 3  # workers that a job may take down before it counts as failed


class _RayMissingError(SpecError, MissingPackageError):
    """Ray was asked for and is absent: as wrong as an unknown engine."""

    def __init__(self) -> None:
        MissingPackageError.__init__(self, "ray", "engine 'ray'", INSTALL)


def check_ray(workers: int | None, gpus: float, cpus: float) -> None:
    """Raise where Ray cannot be used as asked.

    Raises:
        SpecError: Ray is not installed (the text has the command), or a number is out of range.
    """
    if importlib.util.find_spec("ray") is None:
        raise _RayMissingError
    if workers is not None and (type(workers) is not int or workers < 1):
        raise SpecError(f"workers is {workers!r}; allowed: int >= 1")
    for name, value in (("gpus", gpus), ("cpus", cpus)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise SpecError(f"{name} is {value!r}; allowed: number >= 0 (per worker)")


class RayEngine:
    """Runs jobs with several workers.

    Args:
        make_worker: makes a worker; it runs in the worker's process.
        workers: how many; default: as many as the cluster has room for.
        gpus: for each worker; a fraction lets several share one.
        cpus: for each worker.
        address: of a cluster; default: the one that the environment names (``RAY_ADDRESS``), else this machine.

    Raises:
        SpecError: Ray is not installed, or the cluster has no room for a single worker.
        EngineError: Ray does not start.
    """

    def __init__(
        self,
        make_worker: Callable[[], Any],
        workers: int | None = None,
        gpus: float = 0,
        cpus: float = 1,
        address: str | None = None,
    ) -> None:
        check_ray(workers, gpus, cpus)
        import ray

        self.ray = ray
        self.started = not ray.is_initialized()
        if self.started:
            _start_ray(ray, address)
        room = _room(ray.cluster_resources(), gpus, cpus)
        if room < 1:
            has = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
            self.close()
            raise SpecError(f"a worker needs {cpus:g} CPUs and {gpus:g} GPUs; Ray's cluster has {has}")
        self.count = room if workers is None else min(workers, room)
        self._actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        self.make_worker = make_worker
        self._actors: list[Any] = []

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of one worker; what that raises is raised here."""
        actor = self._actors[0] if self._actors else self._start()
        try:
            return self.ray.get(actor.call.remote(method, *arguments))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise EngineError(f"the first of Ray's workers was lost: {str(error).splitlines()[0]}") from error

    def run(self, jobs: Iterable[Any]) -> Iterator[Done]:
        """Each job with its rows, when it is done. One whose worker dies is given to another."""
        waiting = deque((job, 1) for job in jobs)
        running: dict[Any, tuple[Any, Any, int]] = {}
        free = self._actors[: self.count]
        while waiting or running:
            while waiting and len(running) < self.count:
                actor = free.pop() if free else self._start()
                job, tries = waiting.popleft()
                running[actor.call.remote("run", job)] = (actor, job, tries)
            (ended,), _ = self.ray.wait(list(running), num_returns=1)
            actor, job, tries = running.pop(ended)
            try:
                rows = self.ray.get(ended)
            except self.ray.exceptions.RayError as error:
                self.ray.kill(actor)
                self._actors = [other for other in self._actors if other is not actor]
                if tries < TRIES:
                    waiting.append((job, tries + 1))
                else:
                    yield Done(job, None, f"{tries} workers died of it: {str(error).splitlines()[0]}")
                continue
            free.append(actor)
            yield Done(job, rows)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for actor in getattr(self, "_actors", ()):
            self.ray.kill(actor)
        self._actors = []
        if self.started:
            self.ray.shutdown()

    def _start(self) -> Any:
        actor = self._actor.remote(self.make_worker)
        self._actors.append(actor)
        return actor


def _start_ray(ray: Any, address: str | None) -> None:
    # On a busy machine Ray's own agents need longer than the half minute that Ray gives them.
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except Exception as error:
        where = f"at {address}" if address else "on this machine"
        raise EngineError(f"Ray did not start {where}: {str(error).splitlines()[0]}") from error


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], Any]) -> None:
        self.worker = make_worker()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.worker, method)(*arguments)


def _room(resources: dict[str, float], gpus: float, cpus: float) -> int:
    """How many workers a cluster holds."""
    parts = [resources.get(name, 0) / each for name, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return int(min(parts)) if parts else int(resources.get("CPU", 1))
