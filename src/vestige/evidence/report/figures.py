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

__all__ = ["depth_map", "head_map", "retention_curves", "series_of"]

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
    figure = _figure(400)
    partial = table[table["policy"] != "full"]
    ticks = sorted(set(partial["budget"])) or sorted(set(table["budget"]))
    share = dict(zip(table["budget"], table["budget_share"], strict=True))
    edges = [np.log2(ticks[0]) - 0.15, np.log2(ticks[-1]) + 0.15]
    for policy, rows in table.groupby("policy", sort=False):
        rows = rows.sort_values("budget")
        number = series[str(policy)]
        style = {"color": COLOURS[number % 8], "dash": DASHES[number % 8], "width": 2.5}
        x = list(2 ** np.array(edges)) if policy == "full" else list(rows["budget"])
        y, low, high = (list(rows[name]) * (2 if policy == "full" else 1) for name in ("found", "low", "high"))
        counts = [f"{low_:.0%} to {high_:.0%}" for low_, high_ in zip(low, high, strict=True)]
        if policy != "full":
            figure.add_trace(
                go.Scatter(
                    x=[*x, *reversed(x)],
                    y=[*high, *reversed(low)],
                    fill="toself",
                    fillcolor=_faint(COLOURS[number % 8]),
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
                y=y,
                customdata=counts,
                mode="lines" if policy == "full" or len(x) == 0 else "lines+markers",
                name="full cache" if policy == "full" else str(policy),
                line=style,
                marker={"symbol": MARKERS[number % 8], "size": 9, "color": COLOURS[number % 8]},
                legendgroup=policy,
                hovertemplate=f"<b>{policy}</b><br>%{{x}} entries: %{{y:.0%}} (%{{customdata}})<extra></extra>",
                meta={"series": number},
            )
        )
    figure.update_xaxes(
        type="log",
        range=[edge * np.log10(2) for edge in edges],
        tickvals=ticks,
        ticktext=[f"{tick}<br>{share[tick]:.0%}" for tick in ticks],
        title_text="cache entries kept (share of context)",
    )
    figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", dtick=0.25, title_text="facts found")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    return figure


def depth_map(cells: pd.DataFrame, policy: str) -> go.Figure:
    """Share of needles that one policy found, by the needle's depth and the budget.

    Args:
        cells: one row per prompt: ``policy``, ``budget``, ``depth``, ``found``.
        policy: which policy's.
    """
    import plotly.graph_objects as go

    chosen = cells[cells["policy"] == policy]
    grid = chosen.pivot_table(index="depth", columns="budget", values="found", aggfunc="mean").astype(float)
    trace = go.Heatmap(
        z=grid.to_numpy(),
        x=[str(budget) for budget in grid.columns],
        y=[f"{depth:.0%}" for depth in grid.index],
        zmin=0,
        zmax=1,
        colorscale=[list(stop) for stop in SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.0%}",
        textfont={"size": 12, "weight": 600},
        hovertemplate="needle at %{y} of the text, %{x} entries: %{z:.0%} found<extra></extra>",
        meta={"scale": "share"},
    )
    figure = _figure(110 + 30 * len(grid))
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
    figure = _figure(90 + max(240, min(17, 900 // layers) * layers))
    figure.add_trace(trace)
    figure.update_xaxes(title_text="head", dtick=max(1, heads // 12), showgrid=False)
    figure.update_yaxes(title_text="layer", autorange="reversed", dtick=max(1, layers // 10), showgrid=False)
    return figure


def _figure(height: int) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "margin": {"l": 56, "r": 12, "t": 12, "b": 56},
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
        "title": {"standoff": 10},
    }
    figure.update_xaxes(**plain)
    figure.update_yaxes(**plain)
    return figure


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.14)"
