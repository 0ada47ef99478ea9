"""Figures from frames: functions that take measurements and give plotly figures.

On their own they are drawn dark on white; on a page (:mod:`vestige.evidence.report.page`) they take on its colours,
by the role that each trace names in its ``meta``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "COLOURS",
    "DASHES",
    "MARKERS",
    "depth_map",
    "faint",
    "head_map",
    "plain_figure",
    "retention_curves",
    "series_of",
]

# Told apart by hue, brightness, dash and marker, so that no reader depends on colour.
COLOURS = ("#1b1f24", "#0072b2", "#c75000", "#00805c", "#a3478f", "#7a5b00", "#3d6fd6", "#8a3b3b")
SCALE = ((0, "#f1f4f7"), (0.25, "#bcd3e8"), (0.5, "#72a5d1"), (0.75, "#2d70ac"), (1, "#103a6b"))
DASHES = ("dot", "solid", "dash", "dashdot", "longdash", "solid", "dash", "dashdot")
MARKERS = ("circle", "circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")
WRITTEN_HEADS = 16  # up to so many heads per layer there is room to write scores into a head map


def series_of(policies: Any) -> dict[str, int]:
    """The series number of each policy: 0 for the full cache, the others in their order."""
    others = [policy for policy in dict.fromkeys(policies) if policy != "full"]
    return {"full": 0} | {policy: place for place, policy in enumerate(others, start=1)}


def retention_curves(table: pd.DataFrame, series: Mapping[str, int] | None = None) -> go.Figure:
    """Share of needles found against the budget, one line per policy with its 95% interval.

    Args:
        table: what :func:`vestige.evidence.summaries.retention` gives.
        series: colour numbers by policy, where several figures share them.
    """
    import plotly.graph_objects as go

    series = series or series_of(table["policy"])
    figure = plain_figure(400)
    length = float((table["budget"] / table["budget_share"]).max())
    axis, edges = _budget_axis(table["budget"].min(), length)
    figure.update_xaxes(**axis, title_text="cache entries kept, of the context")
    for policy, rows in table.groupby("policy", sort=False):
        rows = rows.sort_values("budget")
        number = series[str(policy)]
        colour = COLOURS[number % len(COLOURS)]
        line = {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2.5}
        x, found, low, high = (list(rows[name]) for name in ("budget", "found", "low", "high"))
        interval = [f"{a:.0%} to {b:.0%}" for a, b in zip(low, high, strict=True)]
        if policy == "full":  # what every budget is measured against, so it runs across
            x, found, interval = list(edges), found * 2, interval * 2
        else:
            figure.add_trace(
                go.Scatter(
                    x=[*x, *reversed(x)],
                    y=[*high, *reversed(low)],
                    fill="toself",
                    fillcolor=faint(colour),
                    mode="none",
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=policy,
                    meta={"series": number},
                )
            )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=found,
                customdata=interval,
                mode="lines" if policy == "full" else "lines+markers",
                name="full cache" if policy == "full" else str(policy),
                line=line,
                marker={"symbol": MARKERS[number % len(MARKERS)], "size": 9, "color": colour},
                legendgroup=policy,
                hovertemplate=f"<b>{policy}</b><br>%{{x}} entries: %{{y:.0%}} (%{{customdata}})<extra></extra>",
                meta={"series": number},
            )
        )
    figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", dtick=0.25, title_text="facts found")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    return figure


def _budget_axis(least: float, length: float) -> tuple[dict[str, Any], tuple[float, float]]:
    """An axis of budgets up to the whole context, and its ends: linear, or by halves where budgets are tiny."""
    if least >= length / 32:
        ticks = [length * share for share in (0.25, 0.5, 0.75, 1)]
        axis: dict[str, Any] = {"type": "linear", "range": [0, 1.02 * length]}
        edges = (0.0, length)
    else:
        halvings = int(np.ceil(np.log2(length / least)))
        ticks = [length / 2**k for k in range(halvings, -1, -1)][:: max(1, halvings // 5)]
        edges = (0.9 * least, length)
        axis = {"type": "log", "range": [float(np.log10(edges[0])), float(np.log10(1.05 * length))]}
    text = [f"{tick / length:.1%}".replace(".0%", "%") + f"<br>{tick:,.0f}" for tick in ticks]
    return axis | {"tickvals": ticks, "ticktext": text}, edges


def depth_map(cells: pd.DataFrame, policy: str) -> go.Figure:
    """Share of needles that one policy found, by the needle's depth and the budget.

    Args:
        cells: one row per prompt: ``policy``, ``budget``, ``depth``, ``found``.
        policy: which policy's.
    """
    import plotly.graph_objects as go

    chosen = cells[cells["policy"] == policy]
    grid = chosen.pivot_table(index="depth", columns="budget", values="found", aggfunc="mean").astype(float)
    shares = grid.to_numpy()
    trace = go.Heatmap(
        z=shares,
        text=[[f"{100 * share:.0f}" for share in row] for row in shares],
        x=[str(budget) for budget in grid.columns],
        y=[f"{depth:.0%}" for depth in grid.index],
        zmin=0,
        zmax=1,
        colorscale=[list(stop) for stop in SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{text}",
        textfont={"size": 12, "weight": 600},
        hovertemplate="needle at %{y} of the text, %{x} entries: %{z:.0%} found<extra></extra>",
        meta={"scale": "share"},
    )
    figure = plain_figure(110 + 30 * len(grid))
    figure.add_trace(trace)
    figure.update_xaxes(type="category", title_text="entries kept", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", title_text="depth of the fact", showgrid=False)
    return figure


def head_map(values: Any, what: str, written_from: float | None = None) -> go.Figure:
    """A number between 0 and 1 for every attention head, as a heat map: layers down, heads across.

    Args:
        values: ``(layers, heads)``.
        what: what the number is.
        written_from: values from this one on are written into their cells (where heads are few enough).
    """
    import plotly.graph_objects as go

    values = np.asarray(values, dtype=float)
    layers, heads = values.shape
    top = max(float(values.max()), 1e-9)
    least = 2.0 if written_from is None or heads > WRITTEN_HEADS else written_from
    text = [[f"{value:.2f}".lstrip("0") if value >= least else "" for value in row] for row in values]
    trace = go.Heatmap(
        z=values,
        zmin=0,
        zmax=top,
        text=text,
        texttemplate="%{text}",
        textfont={"size": 12, "weight": 600},
        colorscale=[list(stop) for stop in SCALE],
        colorbar={"thickness": 10, "len": 0.4, "y": 1, "yanchor": "top", "nticks": 5, "outlinewidth": 0},
        xgap=1,
        ygap=1,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{what}: %{{z:.3f}}<extra></extra>",
        meta={"scale": "share"},
    )
    figure = plain_figure(90 + max(240, min(17, 900 // layers) * layers))
    figure.add_trace(trace)
    figure.update_xaxes(title_text="head", dtick=max(1, heads // 12), showgrid=False)
    figure.update_yaxes(title_text="layer", autorange="reversed", dtick=max(1, layers // 10), showgrid=False)
    return figure


def plain_figure(height: int) -> go.Figure:
    """An empty figure in the house's style; ``height`` in pixels."""
    import plotly.graph_objects as go

    figure = go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 56, "r": 20, "t": 12, "b": 56},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": COLOURS[0]},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "hovermode": "closest",
        }
    )
    plain = {
        "showline": False,
        "zeroline": False,
        "gridcolor": "#e6eaee",
        "ticks": "",
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
        "ticklabeloverflow": "allow",
    }
    figure.update_xaxes(**plain)
    figure.update_yaxes(**plain)
    return figure


def faint(colour: str) -> str:
    """A colour for bands, from one for lines (``#rrggbb``)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.14)"
