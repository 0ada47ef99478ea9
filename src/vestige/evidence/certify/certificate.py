"""What a certification found, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from vestige.evidence.certify.suite import POINTS, Point

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Certificate", "Outcome", "Status"]

Status = Literal["held", "failed", "not applicable"]
PointStatus = Literal["held", "failed", "not applicable", "empty", "left out"]

_STYLE = {"held": "green", "failed": "bold red", "not applicable": "dim", "empty": "bold red", "left out": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """One check's result: its point, name, what it says, status, what was seen (or why not), seconds."""

    point: Point
    name: str
    says: str
    status: Status
    detail: str
    seen: Mapping[str, Any]
    seconds: float
    fills: bool = True


@dataclass(frozen=True)
class Certificate:
    """The outcomes of all checks of a method.

    Attributes:
        method: the spec of the method that was checked.
        model: the name of the model that behaviour was looked at on.
        seeds: the seeds of the behaviour checks.
        outcomes: in the order of the points.
        left_out: points that the caller did not ask for; a certificate with any is partial.
    """

    method: Mapping[str, Any]
    model: str
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    left_out: tuple[Point, ...] = ()

    def of(self, point: Point) -> tuple[Outcome, ...]:
        """The outcomes of one point."""
        return tuple(outcome for outcome in self.outcomes if outcome.point == point)

    @property
    def points(self) -> dict[Point, PointStatus]:
        """The six points, each ``held``, ``failed``, ``not applicable``, ``empty`` (nothing seen) or ``left out``."""
        return {point: self._status(point) for point in POINTS}

    def _status(self, point: Point) -> PointStatus:
        if point in self.left_out:
            return "left out"
        if any(outcome.status == "failed" for outcome in self.of(point)):
            return "failed"
        telling = {outcome.status for outcome in self.of(point) if outcome.fills}
        return "held" if "held" in telling else "not applicable" if telling else "empty"

    @property
    def holds(self) -> bool:
        """Whether no check failed and none of the points that were asked for is empty."""
        return not {"failed", "empty"} & set(self.points.values())

    @property
    def complete(self) -> bool:
        """Whether all six points were asked for."""
        return not self.left_out

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        """One line: what holds, and what does not."""
        name = self.method["name"]
        if self.holds:
            partial = "" if self.complete else f" (partial: {', '.join(self.left_out)} left out)"
            return f"{name}: the certificate holds{partial}"
        wrong = [f"{point} {status}" for point, status in self.points.items() if status in ("failed", "empty")]
        return f"{name}: the certificate does not hold: {', '.join(wrong)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "method": dict(self.method),
            "model": self.model,
            "seeds": list(self.seeds),
            "holds": self.holds,
            "complete": self.complete,
            "points": self.points,
            "seconds": self.seconds,
            "checks": [_plain(asdict(outcome)) for outcome in self.outcomes],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The certificate as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def row(self) -> dict[str, Any]:
        """One row for :meth:`vestige.core.ledger.Ledger.append`."""
        counts: dict[Status, int] = {"held": 0, "failed": 0, "not applicable": 0}
        for outcome in self.outcomes:
            counts[outcome.status] += 1
        return {
            "method": dict(self.method),
            "model": self.model,
            "task": "certificate",
            "seed": list(self.seeds),
            "holds": self.holds,
            "complete": self.complete,
            "points": self.points,
            "metrics": {f"checks {status}": count for status, count in counts.items()},
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """The certificate as a table for the terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=self.summary, title_style="bold" if self.holds else "bold red", show_lines=False, expand=False
        )
        for column, style in (("point", "bold"), ("status", ""), ("check", ""), ("seen", ""), ("s", "dim")):
            table.add_column(column, style=style, justify="right" if column == "s" else "left", overflow="fold")
        for number, (point, status) in enumerate(self.points.items(), 1):
            heading = f"{number} {point}"
            for outcome in self.of(point):
                mark = f"[{_STYLE[outcome.status]}]{outcome.status}[/]"
                table.add_row(heading, mark, escape(outcome.says), escape(outcome.detail), f"{outcome.seconds:.1f}")
                heading = ""
            if not self.of(point):
                table.add_row(heading, f"[{_STYLE[status]}]{status}[/]", "", "", "")
            table.add_section()
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [f"  {o.point:<10} {o.status:<14} {o.name}: {o.detail}" for o in self.outcomes]
        return "\n".join(lines)


def describe(seen: Mapping[str, Any]) -> str:
    """What a check saw, on one line: numbers with four significant digits."""
    return ", ".join(f"{name} {_short(value)}" for name, value in seen.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + describe(value) + "}"
    return str(value)


def _plain(value: Any) -> Any:
    """JSON types only: what JSON does not know becomes its text, and a number that is not finite too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)
