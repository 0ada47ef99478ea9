"""The page of learners on a stream: a table of all, and the matrix of each."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vestige
from vestige.evidence.report.figures import SCALE
from vestige.evidence.report.page import Figure, Figures, Page, Section, Table, Text, write_page

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vestige.evidence.runs.retain import Retained
    from vestige.evidence.runs.spec import Retaining
    from vestige.weights.retain import ContinualRun

__all__ = ["matrix_figure", "retention_page", "write_retention_report"]

COLUMNS = {
    "average": "average at the end",
    "forgetting": "forgetting",
    "plasticity": "just after learning",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "general_kept": "general, change",
    "perplexity_before": "perplexity, before",
    "perplexity": "perplexity, after",
    "replay_bytes": "bytes of examples",
    "state_bytes": "bytes of state",
    "seconds": "seconds",
    "overhead": "of these in the learner",
}


def write_retention_report(done: Retained, spec: Retaining, path: str | os.PathLike[str]) -> Path:
    """Write the page of a run to a file."""
    return write_page(retention_page(done, spec), path)


def matrix_figure(run: ContinualRun) -> go.Figure:
    """Scores on each experience after each, in the page's colours."""
    figure = run.figure()
    figure.update_layout(title=None, height=120 + 44 * len(run.matrix), margin={"l": 20, "r": 10, "t": 10, "b": 40})
    figure.update_traces(colorscale=[list(stop) for stop in SCALE], showscale=False, meta={"scale": "share"})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def retention_page(done: Retained, spec: Retaining) -> Page:
    """The report of a run."""
    table = done.table()
    instead = {"general_kept"} if "perplexity" in table else set()
    columns = [name for name in COLUMNS if name in table and name not in instead]
    rows = [[str(label), *(_cell(name, row[name]) for name in columns)] for label, row in table.iterrows()]
    unit = next(iter(done.runs.values())).unit
    what = "shares answered rightly" if unit == "accuracy" else "mean log-likelihoods per token, in nats"
    what += "; perplexity of examples that no experience teaches" if instead else ""
    figures = [
        Figure(
            name=f"matrix-{n}",
            figure=matrix_figure(run),
            title=label,
            caption="",
            says=f"matrix of scores of {label}: average {run.average:.3f} at the end, forgetting {run.forgetting:.3f}",
        )
        for n, (label, run) in enumerate(done.runs.items())
    ]
    names = next(iter(done.runs.values())).names
    return Page(
        title="What is kept while learning",
        subtitle=f"{len(names)} experiences of {spec.data.name}, one after the other: {'; '.join(names)}.",
        sections=[
            Section("table", "Learners side by side", [Table(["learner", *(COLUMNS[c] for c in columns)], rows, what)]),
            Section("matrices", "Each experience after each", [Figures(figures)]),
            Section("method", "How this was measured", [Text(_method(spec))]),
        ],
        footer=f"Vestige {vestige.__version__}, Python {platform.python_version()}.",
    )


def _cell(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return f"{int(value):,}"
    return f"{value:.1f}" if name == "seconds" or name.startswith("perplexity") else f"{value:.3f}"


def _method(spec: Retaining) -> str:
    training = ", ".join(f"{key} {value}" for key, value in spec.train.items()) or "as transformers has it"
    return (
        "Every learner begins with the same weights and sees the same stream. Forgetting is the mean fall from the "
        "best score that an experience ever had, since it was learnt, to the last. "
        f"Training: {training}; seed {spec.seed}."
    )
