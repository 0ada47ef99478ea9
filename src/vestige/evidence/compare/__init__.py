"""The comparison: methods x tasks x models x seeds; of cache policies also x budgets, at equal bytes or equal time.

Every cell is a row of the folder's ledger, under a key made of all that it depends on, with the command that measures
it again. What is there already is not measured again: a killed comparison goes on where it was. A cell that fails is
recorded with its error, and tried again by the next run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.ledger import Ledger
from vestige.errors import EngineError, SpecError
from vestige.evidence.engine.record import Record, progress_bar

if TYPE_CHECKING:
    from vestige.evidence.compare.plan import Cell
    from vestige.evidence.compare.spec import Comparison
    from vestige.evidence.engine.engine import Engine

__all__ = ["CompareResult", "Estimate", "Rerun", "compare", "rerun"]

LEDGER = "ledger.jsonl"
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Estimate:
    """What a comparison will take.

    Attributes:
        cells: in all.
        missing: those that the ledger lacks.
        readings: jobs that they come to: passes over contexts, each of all examples of a seed; or trained models.
        seconds: about, on one worker.
    """

    cells: int
    missing: int
    readings: int
    seconds: float


@dataclass(frozen=True)
class CompareResult:
    """What a comparison found.

    Attributes:
        ledger: the measurements.
        estimate: what there was to do.
        rows: of this comparison's cells, in their order; of one that failed, its latest error.
        measured: rows added now.
    """

    ledger: Ledger
    estimate: Estimate
    rows: tuple[dict[str, Any], ...]
    measured: int

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """The rows of cells that failed."""
        return tuple(row for row in self.rows if "error" in row)


@dataclass(frozen=True)
class Rerun:
    """A cell measured again: the row that was recorded, and the one measured now (which is not recorded)."""

    before: Mapping[str, Any]
    now: Mapping[str, Any]

    @property
    def same(self) -> bool:
        """Whether every example has the value that it had."""
        return "scored" in self.now and self.now["scored"]["values"] == self.before.get("scored", {}).get("values")


def compare(
    spec: str | os.PathLike[str] | Mapping[str, Any] | Comparison | None = None,
    *,
    out: str | os.PathLike[str] = "vestige-compare",
    engine: str = "local",
    workers: int | None = None,
    gpus: float = 0,
    cpus: float = 1,
    address: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
    **fields: Any,
) -> CompareResult:
    """Measure every method on every task, with every model and seed; cache policies under every budget.

    ::

        vestige.compare("compare.yaml")
        vestige.compare(models="smollm2", tasks="needle", methods=["h2o", "snapkv"], budgets=[0.25, 0.5])
        vestige.compare(tasks="mqar", methods=["softmax", "delta-net"], steps=2000)

    Args:
        spec: a YAML file or a mapping. Its fields go with its tasks: those that read a context have the fields of
            :class:`~vestige.evidence.compare.context.ContextComparison`, those that a model is trained on the fields
            of :class:`~vestige.evidence.compare.training.TrainingComparison`.
        out: folder for ``ledger.jsonl``; measurements found there are not repeated.
        engine: ``"local"``, one cell after the other in this process, or ``"ray"``, side by side.
        workers: of Ray; see :class:`~vestige.evidence.engine.ray.RayEngine`, as for the next three.
        gpus: for each worker.
        cpus: for each worker.
        address: of a Ray cluster.
        dry_run: check everything and estimate, and measure nothing.
        progress: print the estimate, and show a progress bar with the time left, on stderr.
        fields: fields of the comparison, in place of those of ``spec``.

    Raises:
        SpecError: a field, name, parameter or budget is unknown or out of range, with its line where it stands in a
            file; ``out`` is no folder; or its ledger is of a version that cannot be read here. All before anything is
            measured.
        LedgerError: the ledger cannot be read or written.
    """
    from vestige.evidence.compare.spec import lines_of, read_spec

    chosen = read_spec(fields if spec is None else spec)
    if spec is not None and fields:
        chosen = read_spec({**dict(chosen), **fields})
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"out is {str(out)!r}, which is no folder")
    known, broken = _known(folder / LEDGER)
    running = _engine(engine, chosen, workers=workers, gpus=gpus, cpus=cpus, address=address)
    try:
        plan = chosen.plan(running.ask, lines_of(spec))
        cells = plan.cells
        _unique(cells)
        missing = [cell for cell in cells if cell.key not in known]
        jobs = plan.jobs(missing)
        total = sum(job.seconds for job in jobs)
        estimate = Estimate(len(cells), len(missing), len(jobs), total)
        if progress:
            _announce(estimate, running, broken)
        if dry_run:
            return CompareResult(Ledger(folder / LEDGER), estimate, (), 0)
        record = Record(folder / LEDGER)
        failed: dict[str, dict[str, Any]] = {}
        with progress_bar("compare", total, progress) as advance:
            for done in running.run(jobs):
                for row in done.rows if done.rows is not None else _lost(done.job.cells, done.reason):
                    _keep(record, failed, row, None if chosen.pairs else folder / LEDGER)
                advance(done.job.seconds, done.job.says)
    finally:
        running.close()
    found = {**failed, **record.known}
    rows = tuple({**found[cell.key], "key": cell.key} for cell in cells if cell.key in found)
    return CompareResult(record.ledger, estimate, rows, record.measured)


def rerun(ledger: str | os.PathLike[str], key: str) -> Rerun:
    """Measure the cell of a ledger's row again, from what the row itself says. Nothing is recorded.

    Raises:
        SpecError: no such ledger or row, or one that is no comparison's; its task or method is unknown here or of
            another version; or the model has other weights now.
    """
    from vestige.evidence.compare.kinds import kind_of

    path = Path(ledger)
    if not path.is_file():
        raise SpecError(f"no ledger {str(ledger)!r}")
    rows = {row["key"]: row for row in Ledger(path).rows() if isinstance(row.get("key"), str)}
    if key not in rows:
        from vestige.core.method import nearest

        close = nearest(key, rows)
        raise SpecError(f"{path} has no row {key!r}{'; did you mean ' + close[0] + '?' if close else ''}")
    before = rows[key]
    if "cell" not in before:
        raise SpecError(f"the row {key!r} is no cell of a comparison")
    return Rerun(before, kind_of(before["cell"]["task"]).again(before["cell"], key))


def _engine(engine: str, chosen: Comparison, **of_ray: Any) -> Engine:
    from vestige.core.method import did_you_mean

    if engine not in ENGINES:
        raise SpecError(f"unknown engine {engine!r}; {did_you_mean(str(engine), ENGINES)}")
    if engine == "ray":
        from vestige.evidence.engine.ray import RayEngine, check_ray

        check_ray(of_ray["workers"], of_ray["gpus"], of_ray["cpus"])
        if chosen.pairs:
            raise SpecError("engine 'ray' needs models by name or folder: its workers load their own")
        return RayEngine(chosen.worker(), **of_ray)
    from vestige.evidence.engine.local import LocalEngine

    return LocalEngine(chosen.worker())


def _unique(cells: list[Cell]) -> None:
    """Raise where two cells are the same measurement, as with one task given twice."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in seen:
            raise SpecError(f"the comparison holds {cell.task.name} with {cell.method.name} twice")
        seen[cell.key] = cell


def _known(path: Path) -> tuple[set[str], int]:
    """The keys that a ledger has, and how many of its lines cannot be read."""
    if not path.exists():
        return set(), 0
    ledger = Ledger(path)
    return {row["key"] for row in ledger.rows() if isinstance(row.get("key"), str)}, ledger.broken


def _keep(record: Record, failed: dict[str, dict[str, Any]], row: dict[str, Any], ledger: Path | None) -> None:
    """Put a row into the ledger; that of a failure under a key of its own, so that the cell is tried again."""
    key = row.pop("key")
    if ledger is not None:
        row["command"] = f"vestige compare {_quoted(ledger)} --only {key}"
    if "error" not in row:
        record.store(key, **row)
        return
    tries = 1
    while f"{key}-failed-{tries}" in record.known:
        tries += 1
    failed[key] = row
    record.store(f"{key}-failed-{tries}", **row)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def _lost(cells: Iterable[Cell], reason: str) -> list[dict[str, Any]]:
    """Rows of a job that no worker survived."""
    return [cell.failed(EngineError(reason)) for cell in cells]


def _announce(estimate: Estimate, running: Engine, broken: int) -> None:
    from rich.console import Console

    if broken:
        Console(stderr=True).print(f"{broken} broken {'line' if broken == 1 else 'lines'} in the ledger skipped")

    workers = getattr(running, "count", 1)
    there = estimate.cells - estimate.missing
    left = f"about {duration(estimate.seconds / workers)}" if estimate.missing else "nothing to do"
    beside = f" on {workers} workers" if workers > 1 else ""
    Console(stderr=True).print(
        f"{estimate.cells} cells, {there} of them in the ledger; {estimate.missing} to measure in "
        f"{estimate.readings} jobs{beside}: {left}",
        highlight=False,
    )


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
