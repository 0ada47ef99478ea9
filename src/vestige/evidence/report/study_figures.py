"""Figures that studies share: lines over a scale, bars side by side, each with the spread of its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige.evidence.report.figures import COLOURS, DASHES, MARKERS, faint, plain_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["bars", "decimal_ticks", "lines"]


def lines(
    series: Mapping[str, tuple[Sequence[float], Any]],
    *,
    across: str,
    up: str,
    log: str = "",
    predicted: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    height: int = 380,
) -> go.Figure:
    """One line per series through the means of the seeds, with a band from the smallest to the largest.

    Args:
        series: names to places on the horizontal axis, and values ``(seeds, places)``.
        across: title of the horizontal axis.
        up: title of the vertical axis.
        log: the axes that are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        predicted: names to the places and values that a formula gives; drawn as dotted lines in the colour of the
            series of the same name.
        height: in pixels.
    """
    import plotly.graph_objects as go

    figure = plain_figure(height)
    numbers = {name: place for place, name in enumerate(series, start=1)}
    for name, (x, values) in series.items():
        rows = np.atleast_2d(np.asarray(values, dtype=float))
        low, mean, high = rows.min(axis=0), rows.mean(axis=0), rows.max(axis=0)
        number, places = numbers[name], [float(v) for v in x]
        colour = COLOURS[number % len(COLOURS)]
        role = {"legendgroup": name, "meta": {"series": number}}
        if len(rows) > 1:
            band = {"fill": "toself", "fillcolor": faint(colour), "mode": "none", "hoverinfo": "skip"}
            edge = {"x": [*places, *reversed(places)], "y": [*high, *reversed(low)]}
            figure.add_trace(go.Scatter(**edge, **band, **role, showlegend=False))
        figure.add_trace(
            go.Scatter(
                x=places,
                y=mean,
                customdata=np.stack([low, high], axis=1),
                mode="lines+markers",
                name=name,
                line={"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2.5},
                marker={"symbol": MARKERS[number % len(MARKERS)], "size": 8, "color": colour},
                hovertemplate=f"<b>{name}</b><br>%{{x}}: %{{y:.3g}} "
                "(%{customdata[0]:.3g} to %{customdata[1]:.3g})<extra></extra>",
                **role,
            )
        )
    for name, (x, due) in (predicted or {}).items():
        number = numbers.get(name, 0)
        label = f"{name}, predicted" if name in numbers else name
        figure.add_trace(
            go.Scatter(
                x=list(x),
                y=list(due),
                mode="lines",
                name=label,
                line={"color": COLOURS[number % len(COLOURS)], "dash": "dot", "width": 1.5},
                hovertemplate=f"<b>{label}</b><br>%{{x}}: %{{y:.3g}}<extra></extra>",
                meta={"series": number},
            )
        )
    figure.update_xaxes(title_text=across, type="log" if "x" in log else "linear")
    figure.update_yaxes(title_text=up, type="log" if "y" in log else "linear")
    if "y" in log:
        everything = [v for _, values in series.values() for v in np.ravel(values)]
        ticks = decimal_ticks(min(everything), max(everything))
        figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    if "x" in log:  # the places measured say more than powers of ten
        ticks = sorted({float(v) for x, _ in series.values() for v in x})
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    return figure


def decimal_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Ticks of a logarithmic axis, each with its whole number: 1, 2, 5 of every power of ten; of a long axis fewer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
        found = [tick for tick in found if low / 1.5 <= tick <= high * 1.5]
        if len(found) <= most:
            break
    return found


def bars(groups: Mapping[str, Mapping[str, Sequence[float]]], *, across: str, base: float | None = None) -> go.Figure:
    """Horizontal dots with the spread of the seeds: one row per name, one colour per group.

    Args:
        groups: names of groups to names of rows to one value per seed.
        across: title of the axis of values.
        base: a value to compare with, drawn as a line.
    """
    import plotly.graph_objects as go

    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    figure = plain_figure(120 + 34 * len(names))
    for number, (group, rows) in enumerate(groups.items(), start=1):
        means = [float(np.mean(values)) for values in rows.values()]
        highs = [max(values) - mean for values, mean in zip(rows.values(), means, strict=True)]
        lows = [mean - min(values) for values, mean in zip(rows.values(), means, strict=True)]
        colour = COLOURS[number % len(COLOURS)]
        figure.add_trace(
            go.Scatter(
                x=means,
                y=list(rows),
                error_x={"type": "data", "array": highs, "arrayminus": lows, "thickness": 1.5, "width": 5},
                mode="markers",
                name=group,
                marker={"symbol": MARKERS[number % len(MARKERS)], "size": 10, "color": colour},
                hovertemplate=f"<b>%{{y}}</b>, {group}: %{{x:.3g}}<extra></extra>",
                meta={"series": number},
            )
        )
    if base is not None:
        figure.add_vline(x=base, line={"dash": "dot", "width": 1.5, "color": COLOURS[0]})
    figure.update_xaxes(title_text=across)
    figure.update_yaxes(categoryorder="array", categoryarray=list(reversed(names)))
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    return figure
