"""From a ledger's rows to points: what a method is worth under a budget, over examples and seeds, and what it costs."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vestige.errors import VestigeError
from vestige.evidence.amounts import size
from vestige.evidence.statistics import Interval, bootstrap, wilson

__all__ = ["Group", "Point", "Points", "better", "difference", "pareto", "points_of", "shown"]

Group = tuple[str, str, str]
"""A model, a task and a metric: only points of one group compare."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A method under a budget, on a task, with a model.

    Attributes:
        model, task: by name, the task with its parameters.
        metric, higher_is_better, chance, ceiling: of the task.
        method: its name, with the parameters that are not at their default.
        budget: as it was asked for; empty for a method that has none.
        spec: of the method, the budget in its own terms.
        values: of every example, by seed and place.
        length: tokens of a context, or of a row; 0 where there are none.
        kv_bytes: held per context, as a mean.
        seconds_per_token, prefill_seconds: median over the seeds that were timed; ``None`` where none was.
        keys: of the rows.
        machine: the hardware on which the time was measured.
    """

    model: str
    task: str
    metric: str
    higher_is_better: bool
    chance: float | None
    ceiling: float | None
    method: str
    budget: str
    spec: Mapping[str, Any]
    values: Mapping[tuple[int, int], float]
    length: int
    kv_bytes: float
    seconds_per_token: float | None
    prefill_seconds: float | None
    keys: tuple[str, ...]
    machine: str = ""

    @functools.cached_property
    def interval(self) -> Interval:
        """The mean with its 95% interval: Wilson's where examples are right or wrong, else by bootstrap."""
        values = list(self.values.values())
        if self.metric == "accuracy" and set(values) <= {0.0, 1.0}:
            return wilson(int(sum(values)), len(values))
        return bootstrap(values)

    @property
    def value(self) -> float:
        """The mean over examples and seeds."""
        return statistics.fmean(self.values.values())

    @property
    def seeds(self) -> int:
        """How many seeds."""
        return len({seed for seed, _ in self.values})

    @property
    def value_text(self) -> str:
        """The value with its interval, as people read it."""
        found = self.interval
        return (
            f"{shown(found.value, self.metric)} ({shown(found.low, self.metric)} to {shown(found.high, self.metric)})"
        )

    @property
    def bytes_text(self) -> str:
        """The bytes, as people read them."""
        return size(self.kv_bytes)

    @property
    def time_text(self) -> str:
        """Milliseconds per decoded token."""
        return "" if self.seconds_per_token is None else f"{1000 * self.seconds_per_token:.1f}"


class Points:
    """The points of some rows, by what compares."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.all = tuple(points)

    def groups(self) -> list[tuple[Group, list[Point]]]:
        """Points that compare with one another, the full cache first."""
        found: dict[Group, list[Point]] = {}
        for point in self.all:
            found.setdefault((point.model, point.task, point.metric), []).append(point)
        return list(found.items())


def points_of(rows: Iterable[Mapping[str, Any]]) -> Points:
    """The points of a ledger's rows, of comparisons and of audits. Failures and rows of other kinds are left out."""
    together: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        identity = _identity(row)
        if identity is not None:
            together.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    return Points(_point(group) for group in together.values())


def pareto(points: Sequence[Point], cost: Any) -> list[Point]:
    """The points that no other beats: of those that cost no more, none is better. By cost, ascending.

    Args:
        cost: of a point, a function; points of which it gives None are left out.
    """
    priced = sorted((p for p in points if cost(p) is not None), key=lambda p: (cost(p), -better(p)))
    front: list[Point] = []
    for point in priced:
        if not front or better(point) > better(front[-1]):
            front.append(point)
    return front


def better(point: Point) -> float:
    """The value, turned so that more is better."""
    return point.value if point.higher_is_better else -point.value


def difference(one: Point, other: Point) -> Interval:
    """How much better ``one`` is than ``other`` on the examples that both were asked, with its 95% interval.

    The two saw the same examples, so their differences are drawn, and not each one's values.
    """
    shared = sorted(set(one.values) & set(other.values))
    sign = 1 if one.higher_is_better else -1
    return bootstrap([sign * (one.values[place] - other.values[place]) for place in shared])


def shown(value: float, metric: str) -> str:
    """A value as people read it: shares as percentages."""
    return f"{100 * value:.0f}%" if metric == "accuracy" else f"{value:.3g}"


_ASIDE = ("batch", "timed", "device", "dtype")  # of a cell, what does not change what is found


def _identity(row: Mapping[str, Any]) -> list[Any] | None:
    """What rows of one point have in common; None for a row that is no measurement of a method on a task."""
    if row.get("study") == "compare" and "scored" in row:
        cell = row["cell"]
        apart = {"seed", *_ASIDE} | ({"equal"} if cell["budget"] is None else set())
        return [cell[name] for name in sorted(cell) if name not in apart]
    if row.get("study") == "audit" and "found" in row.get("metrics", {}):
        return [row["model"], row["method"], row["task"]["length"], row["metrics"]["budget"]]
    return None


def _point(rows: Sequence[Mapping[str, Any]]) -> Point:
    first = rows[0]
    if first["study"] == "audit":
        return _audit_point(rows)
    cell, scored = first["cell"], first["scored"]
    values = {(row["seed"], place): value for row in rows for place, value in enumerate(row["scored"]["values"])}
    return Point(
        model=first["model"],
        task=cell["task_label"],
        metric=scored["metric"],
        higher_is_better=scored["higher_is_better"],
        chance=scored["chance"],
        ceiling=scored["ceiling"],
        method=cell["label"],
        budget="" if first["budget"] is None else first["budget"]["asked"],
        spec=first["method"],
        values=values,
        length=first["task"].get("length", 0),
        kv_bytes=statistics.fmean(row["kv_bytes"] for row in rows),
        seconds_per_token=_median(rows, "decode_seconds_per_token"),
        prefill_seconds=_median(rows, "prefill_seconds"),
        keys=tuple(row["key"] for row in rows if "key" in row),
        machine=_machine(first),
    )


def _audit_point(rows: Sequence[Mapping[str, Any]]) -> Point:
    first = rows[0]
    places = [(row["seed"], round(1000 * row["task"]["depth"])) for row in rows]
    full = first["method"]["name"] == "full"
    return Point(
        model=first["model"],
        task=f"needle (length={first['task']['length']}), as audited",
        metric="accuracy",
        higher_is_better=True,
        chance=None,
        ceiling=1.0,
        method=_label(first["method"]),
        budget="" if full else f"{first['metrics']['budget']} entries",
        spec=first["method"],
        values={place: float(row["metrics"]["found"]) for place, row in zip(places, rows, strict=True)},
        length=first["task"]["length"],
        kv_bytes=statistics.fmean(row["kv_bytes"] for row in rows),
        seconds_per_token=None,
        prefill_seconds=None,
        keys=tuple(row["key"] for row in rows if "key" in row),
        machine=_machine(first),
    )


def _label(spec: Mapping[str, Any]) -> str:
    """A method's label, from its spec; its name where it is not known here."""
    from vestige.core.method import Method
    from vestige.evidence.budgets import label

    try:
        return label(Method.from_spec(spec))
    except VestigeError:
        return str(spec["name"])


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [row["metrics"][name] for row in rows if row["metrics"].get(name) is not None]
    return statistics.median(found) if found else None


def _machine(row: Mapping[str, Any]) -> str:
    hardware = row.get("hardware") or {}
    gpus = hardware.get("gpu") or []
    return ", ".join(gpus) if gpus else f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores"
