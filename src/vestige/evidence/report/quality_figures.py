"""Quality against what it costs, one figure per task: a line for each method, intervals, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige.evidence.amounts import size
from vestige.evidence.points import Point, pareto
from vestige.evidence.report.figures import COLOURS, DASHES, MARKERS, SCALE, plain_figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["Cost", "bytes_cost", "matrix_figure", "quality_figure", "seconds_cost"]

SEEN = 0.01  # a chance below this lies on the axis
WIDE_RANGE = 12  # from this ratio of the largest to the smallest on, costs stand on a logarithmic axis


class Cost:
    """Something that a point costs: how much, and how it is written, in words and on an axis."""

    def __init__(
        self,
        of: Callable[[Point], float | None],
        title: str,
        text: Callable[[float], str],
        ticks: Mapping[str, str] | None = None,
    ) -> None:
        self.of, self.title, self.text, self.ticks = of, title, text, dict(ticks or {})


def _bytes(point: Point) -> float:
    return point.kv_bytes


def _milliseconds(point: Point) -> float | None:
    return None if point.seconds_per_token is None else 1000 * point.seconds_per_token


bytes_cost = Cost(_bytes, "memory held per context", size, {"tickformat": "~s", "ticksuffix": "B"})
seconds_cost = Cost(_milliseconds, "time per decoded token, ms", lambda value: f"{value:.3g} ms per token")


def quality_figure(
    points: Sequence[Point], cost: Cost, names: Mapping[Point, str], series: Mapping[str, int]
) -> go.Figure:
    """The points of one task and model, by what they cost.

    Args:
        points: of one group; see :meth:`vestige.evidence.points.Points.groups`.
        names: of the points, by which the page finds their records.
        series: a number for each method, which gives its colour, dash and marker.
    """
    import plotly.graph_objects as go

    figure = plain_figure(420)
    metric = points[0].metric
    _front(figure, pareto(points, cost.of), cost)
    for method, number in series.items():
        own = [point for point in points if point.method == method and cost.of(point) is not None]
        own.sort(key=cost.of)  # type: ignore[arg-type, return-value]
        if not own:
            continue
        found = [point.interval for point in own]
        colour = COLOURS[number % len(COLOURS)]
        turn = number // len(COLOURS)  # the ninth method has the first one's colour, and another marker and dash
        told = [f"{p.budget}: {p.value_text}, {cost.text(cost.of(p) or 0)}".removeprefix(": ") for p in own]
        figure.add_trace(
            go.Scatter(
                x=[cost.of(point) for point in own],
                y=[point.value for point in own],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [interval.high - interval.value for interval in found],
                    "arrayminus": [interval.value - interval.low for interval in found],
                    "thickness": 1,
                    "width": 3,
                    "color": colour,
                },
                customdata=[{"point": names[point], "told": text} for point, text in zip(own, told, strict=True)],
                mode="lines+markers" if len(own) > 1 else "markers",
                name="full cache" if method == "full" else method,
                line={"color": colour, "dash": DASHES[(number + 3 * turn) % len(DASHES)], "width": 2},
                marker={"symbol": MARKERS[(number + turn) % len(MARKERS)], "size": 10, "color": colour},
                hovertemplate=f"<b>{method}</b><br>%{{customdata.told}}<extra></extra>",
                meta={"series": number},
            )
        )
    figure.update_xaxes(**_axis([cost.of(point) for point in points]), **cost.ticks, title_text=cost.title)
    if metric == "accuracy":
        figure.update_yaxes(range=[-0.03, 1.05], tickformat=".0%", dtick=0.25, title_text="accuracy")
    else:
        way = "higher" if points[0].higher_is_better else "lower"
        figure.update_yaxes(title_text=f"{metric} ({way} is better)")
    if points[0].chance is not None and points[0].chance >= SEEN:
        note = {"annotation_text": "chance", "annotation_position": "bottom right"}
        figure.add_hline(points[0].chance, line={"dash": "dot", "width": 1, "color": "#8a949e"}, **note)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    return figure


def _front(figure: go.Figure, front: Sequence[Point], cost: Cost) -> None:
    """The Pareto front as steps: what can be had for each amount."""
    import plotly.graph_objects as go

    if len(front) > 1:
        figure.add_trace(
            go.Scatter(
                x=[cost.of(point) for point in front],
                y=[point.value for point in front],
                mode="lines",
                line={"shape": "hv", "width": 7, "color": "#d5dbe1"},
                hoverinfo="skip",
                name="Pareto front",
                meta={"tone": "line"},
            )
        )


def _axis(costs: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in costs if value is not None]
    low, high = min(known), max(known)
    if low > 0 and high / low > WIDE_RANGE:
        return {"type": "log", "range": [float(np.log10(low / 1.3)), float(np.log10(1.3 * high))], "dtick": "D2"}
    return {"type": "linear", "range": [0, 1.06 * high]}


def matrix_figure(matrix: Any, names: Sequence[str], unit: str) -> go.Figure:
    """Scores on each experience (across) after learning each (down)."""
    import plotly.graph_objects as go

    values = np.asarray(matrix, dtype=float)
    form = ".0%" if unit == "accuracy" else ".2f"
    trace = go.Heatmap(
        z=values,
        x=[f"asked {name}" for name in names],
        y=[f"after {name}" for name in names[: len(values)]],
        texttemplate="%{z:" + form + "}",
        textfont={"size": 12, "weight": 600},
        colorscale=[list(stop) for stop in SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate="%{y}, %{x}: %{z:" + form + "}<extra></extra>",
        meta={"scale": "share"},
        **({"zmin": 0, "zmax": 1} if unit == "accuracy" else {}),
    )
    figure = plain_figure(110 + 34 * len(values))
    figure.add_trace(trace)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure
