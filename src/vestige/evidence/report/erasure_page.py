"""The page of an erasure audit: answers in words, one figure, one table."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vestige
from vestige.core.packages import need
from vestige.evidence.erasure.result import ErasureAudit, Measure, written
from vestige.evidence.report.figures import COLOURS, DASHES, MARKERS
from vestige.evidence.report.page import Answers, Figure, Page, Section, Table, Text, write_page
from vestige.evidence.statistics import Interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["erasure_figure", "erasure_page", "write_erasure_report"]

SERIES = {"erased": 1, "retrained": 3, "before": 2}


def write_erasure_report(audit: ErasureAudit, path: str | os.PathLike[str]) -> Path:
    """Write the page of an audit to a file."""
    need("ErasureAudit.report()", "report", "jinja2", "plotly")
    return write_page(erasure_page(audit), path)


def erasure_figure(audit: ErasureAudit) -> go.Figure:
    """Above, every share, one mark per model with its 95% interval; below, accuracy against steps of relearning."""
    need("ErasureAudit.figure()", "report", "plotly")
    from plotly.subplots import make_subplots

    shares = [measure for measure in audit.measures if measure.unit == "share"]
    both = bool(audit.curves)
    top, below = 40 + 26 * len(shares), 260 if both else 0
    figure = make_subplots(
        rows=1 + both,
        cols=1,
        row_heights=[top, below] if both else [top],
        vertical_spacing=90 / (top + below + 90) if both else 0,
    )
    for name in audit.subjects:
        for trace in (_marks(shares, name), *_curves(audit, name)):
            figure.add_trace(trace, row=1 if trace.orientation == "h" else 2, col=1)
    figure.update_layout(
        template="none",
        height=top + below + 150,
        margin={"l": 20, "r": 20, "t": 30, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": COLOURS[0]},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hovermode="closest",
    )
    plain = {"showline": False, "zeroline": False, "gridcolor": "#e6eaee", "ticks": "", "automargin": True}
    figure.update_xaxes(**plain)
    figure.update_yaxes(**plain)
    figure.update_xaxes(range=[-0.02, 1.02], dtick=0.25, title_text="share", row=1, col=1)
    figure.update_yaxes(autorange="reversed", type="category", row=1, col=1)
    if both:
        figure.update_xaxes(title_text="steps of teaching half of the rows to forget again", row=2, col=1)
        figure.update_yaxes(range=[-0.03, 1.03], title_text="accuracy", dtick=0.25, row=2, col=1)
    return figure


def _marks(shares: list[Measure], name: str) -> Any:
    import plotly.graph_objects as go

    series = SERIES[name]
    found = [(measure, measure.values[name]) for measure in shares if name in measure.values]
    values = [value.value if isinstance(value, Interval) else value for _, value in found]
    spans = [(v.low, v.high) if isinstance(v, Interval) else (x, x) for (_, v), x in zip(found, values, strict=True)]
    return go.Scatter(
        x=values,
        y=[measure.name for measure, _ in found],
        orientation="h",
        mode="markers",
        name=name,
        legendgroup=name,
        marker={"symbol": MARKERS[series], "size": 11, "color": COLOURS[series]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - x for (_, high), x in zip(spans, values, strict=True)],  # type: ignore[operator]
            "arrayminus": [x - low for (low, _), x in zip(spans, values, strict=True)],  # type: ignore[operator]
            "thickness": 1.5,
            "width": 0,
        },
        customdata=[measure.says for measure, _ in found],
        hovertemplate=f"<b>{name}</b><br>%{{y}}: %{{x:.2f}}<br>%{{customdata}}<extra></extra>",
        meta={"series": series},
    )


def _curves(audit: ErasureAudit, name: str) -> list[Any]:
    """The rows that are taught, drawn through; the rest, dotted."""
    import plotly.graph_objects as go

    if name not in audit.curves:
        return []
    series, curve = SERIES[name], audit.curves[name]
    return [
        go.Scatter(
            x=list(curve.steps),
            y=list(values),
            mode="lines",
            orientation="v",
            line={"color": COLOURS[series], "dash": dash, "width": 2.5},
            legendgroup=name,
            showlegend=False,
            name=f"{name}, {which}",
            hovertemplate=f"<b>{name}</b>, {which}<br>%{{x}} steps: %{{y:.0%}}<extra></extra>",
            meta={"series": series},
        )
        for which, values, dash in (("taught", curve.taught, "solid"), ("the rest", curve.rest, DASHES[0]))
    ]


def erasure_page(audit: ErasureAudit) -> Page:
    """The page of an audit."""
    looked = ", ".join(f"{name} {size:,}" for name, size in audit.sizes.items())
    others = [name for name in audit.subjects if name != "erased"]
    beside = f"beside {' and '.join(others)}" if others else "with no other model beside it"
    caption = "Marks: shares with 95% bootstrap intervals over rows."
    if audit.curves:
        caption += " Lines: accuracy while half of the rows to forget are taught again, on these; dotted, on the rest."
    figure = Figure(
        name="what-remains",
        figure=erasure_figure(audit),
        title="What remains, by every way of looking",
        caption=caption,
        says=f"{len(audit.measures)} measures of {len(audit.subjects)} models; the table below holds the numbers",
    )
    notes = [Text(f"Not measured: {note}.") for note in audit.notes]
    how = audit.relearning
    method = Text(
        f"Rows: {looked}; at most {audit.rows:,} of each set were looked at (seed {audit.seed}). Relearning: Adam, "
        f"step size {how.learning_rate:g}, batches of {how.batch}, {how.steps} steps at most, the same for every "
        "model. Four bits: the blocks' linear maps, 64 numbers to a scale, rounded to nearest. Probe: logistic "
        "regression on standardised states, five folds."
    )
    return Page(
        title=f"What is left of {audit.sizes['forget']:,} examples",
        subtitle=f"A model that was made to forget them, {beside}. The aim is to be near the retrained model, not low.",
        sections=[
            Section("answers", "In short", [Answers(answers(audit))]),
            Section("figure", "What remains", [figure]),
            Section("table", "The numbers", [table(audit)]),
            Section("method", "How this was measured", [method, *notes]),
        ],
        footer=f"Vestige {vestige.__version__}, Python {platform.python_version()}; {audit.seconds:.0f} seconds.",
    )


def table(audit: ErasureAudit) -> Table:
    """All measures, with intervals."""

    def cell(measure: Measure, name: str) -> str:
        value = measure.values.get(name)
        text = written(measure, name)
        return f"{text} ({value.low:.2f} to {value.high:.2f})" if isinstance(value, Interval) else text

    rows = [[m.name, m.says, *(cell(m, name) for name in audit.subjects)] for m in audit.measures]
    return Table(["measure", "what it is", *audit.subjects], rows, "With 95% bootstrap intervals over rows", labels=2)


def answers(audit: ErasureAudit) -> list[tuple[str, str]]:
    """The headline answers: a number and a sentence each."""
    known = {measure.name for measure in audit.measures}

    def beside(name: str) -> str:
        others = [f"{other} {written(audit[name], other)}" for other in audit.subjects if other != "erased"]
        return f" ({', '.join(others)})" if others else ""

    sentences = {
        "forget accuracy": "is the accuracy that is left on what was to be forgotten",
        "retain accuracy": "is the accuracy on what was to be kept",
        "membership by loss": "is how well losses tell what was to be forgotten from the never seen; 0.5 is chance",
        "forget accuracy, 4 bits": "is the accuracy on what was to be forgotten with weights in four bits",
        "forget verbatim": "of a forgotten row is recited from its beginning",
        "probe": "of the forgotten labels are still read by a linear probe",
        "steps to relearn": "steps bring the half that is taught again back to 90%",
    }
    return [
        (written(audit[name], "erased"), f"{sentence}{beside(name)}.")
        for name, sentence in sentences.items()
        if name in known
    ]
