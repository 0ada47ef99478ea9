"""What an audit of an erasure found: one table, one figure, one page."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.packages import need
from vestige.evidence.erasure.probe import Probed
from vestige.evidence.erasure.relearn import Relearned, Relearning
from vestige.evidence.statistics import Interval

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

__all__ = ["ErasureAudit", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One way of looking, on every model.

    Attributes:
        name: short.
        says: what the number is.
        unit: ``"share"`` (0 to 1) or ``"steps"``.
        values: by model; an interval where rows were drawn from, ``None`` where a number of steps was not enough.
    """

    name: str
    says: str
    unit: str
    values: dict[str, Interval | float | None]

    def value(self, subject: str) -> float | None:
        """The number alone."""
        found = self.values.get(subject)
        return found.value if isinstance(found, Interval) else found


@dataclass(frozen=True)
class ErasureAudit:
    """What remains of examples in a model that was made to forget them.

    Attributes:
        subjects: the models looked at: ``"erased"``, and of ``"retrained"`` and ``"before"`` those that were given.
        measures: the table's rows.
        curves: what relearning brought back, by model.
        probes: what linear probes read, by model.
        sizes: rows of each set.
        rows: of each set that were looked at, at most.
        relearning: how models were taught again.
        causal: whether they are language models.
        notes: what was not measured, and why.
        seed: of all draws.
        seconds: how long it took.
    """

    subjects: tuple[str, ...]
    measures: tuple[Measure, ...]
    curves: dict[str, Relearned]
    probes: dict[str, Probed]
    sizes: dict[str, int]
    rows: int
    relearning: Relearning
    causal: bool
    notes: tuple[str, ...] = ()
    seed: int = 0
    seconds: float = field(default=0.0, compare=False)

    def __getitem__(self, measure: str) -> Measure:
        """A measure by its name.

        Raises:
            KeyError: it was not made.
        """
        for each in self.measures:
            if each.name == measure:
                return each
        raise KeyError(f"{measure!r}; measured: {', '.join(each.name for each in self.measures)}")

    def metrics(self) -> dict[str, float]:
        """The numbers of the erased model by name; those that have a value."""
        found = {each.name: each.value("erased") for each in self.measures}
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "subjects": list(self.subjects),
            "measures": [
                {
                    "name": each.name,
                    "says": each.says,
                    "unit": each.unit,
                    "values": {n: asdict(v) if isinstance(v, Interval) else v for n, v in each.values.items()},
                }
                for each in self.measures
            ],
            "curves": {name: asdict(curve) for name, curve in self.curves.items()},
            "probes": {name: asdict(probed) for name, probed in self.probes.items()},
            "sizes": dict(self.sizes),
            "rows": self.rows,
            "relearning": asdict(self.relearning),
            "notes": list(self.notes),
            "seed": self.seed,
            "seconds": self.seconds,
        }

    def row(self, method: dict[str, Any] | None = None, model: str = "") -> dict[str, Any]:
        """A row for the :class:`~vestige.core.ledger.Ledger`."""
        found = self.to_dict()
        return {
            **({} if method is None else {"method": method}),
            "model": model,
            "task": {"name": "erasure audit", "sizes": found["sizes"], "relearning": found["relearning"]},
            "seed": self.seed,
            "metrics": self.metrics(),
            "measures": found["measures"],
            "seconds": self.seconds,
        }

    def table(self) -> pandas.DataFrame:
        """One row per measure, one column per model.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        need("ErasureAudit.table()", "report", "pandas")
        import pandas

        rows = [[each.value(name) for name in self.subjects] for each in self.measures]
        index = pandas.Index([each.name for each in self.measures], name="measure")
        return pandas.DataFrame(rows, index=index, columns=list(self.subjects), dtype=object)

    def figure(self) -> go.Figure:
        """Every share beside that of the other models, and what relearning brings back.

        Raises:
            MissingPackageError: plotly is not installed.
        """
        from vestige.evidence.report.erasure_page import erasure_figure

        return erasure_figure(self)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that needs no network.

        Raises:
            MissingPackageError: plotly or jinja2 is not installed.
        """
        from vestige.evidence.report.erasure_page import write_erasure_report

        return write_erasure_report(self, path)

    def __str__(self) -> str:
        columns = [["", *self.subjects]]
        for each in self.measures:
            columns.append([each.name, *(written(each, name) for name in self.subjects)])
        widths = [max(len(row[n]) for row in columns) for n in range(len(self.subjects) + 1)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in columns
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def written(measure: Measure, subject: str) -> str:
    """A value as a reader wants it."""
    if subject not in measure.values:
        return ""
    value = measure.value(subject)
    if value is None:
        return "none"
    return f"{value:.0f}" if measure.unit == "steps" else f"{value:.2f}"
