"""Draw the figures of docs/layers.md from the results beside this script.

    python benchmarks/layers/figures.py             # into docs/figures

What is recalled against the bytes held (quality-recall.jsonl, of quality.py), and time and bytes of a decoding step
against the context (decoding-*.json, of decoding.py). Plain SVG, readable on light and dark pages; every number in
them stands in those files.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from drawing import rows_of, svg, text, write  # noqa: E402

RECALL = "quality-recall.jsonl"
DECODING, GROWS = ("decoding-h100.json", "decoding-cpu.json"), "softmax"  # the first with what grows beside the others

# What stands out, by the mixer's name; all others are grey and say their name when pointed at.
COLOURS = {
    "softmax": "#dc2626",
    "local-linear-attention": "#b45309",
    "sliding-window": "#ca8a04",
    "based": "#ea580c",
    "based+sliding-window": "#475569",
    "lizard": "#db2777",
    "linear-attention": "#65a30d",
    "gla": "#0891b2",
    "mamba2": "#2563eb",
    "delta-net": "#7c3aed",
    "gated-delta-net": "#0f766e",
    "titans": "#c026d3",
    "hgrn2": "#16a34a",
    "sparse-state-expansion": "#9d174d",
    "yaad": "#0284c7",
    "lightning-attention": "#78716c",
    "transnormer-llm": "#a16207",
    "aaren": "#22d3ee",
}
Point = tuple[float, float, float, float]
"""Place on the axis, value, the least and the most of several seeds."""


class Panel:
    """Axes with a logarithmic scale from left to right, and curves on them."""

    def __init__(self, left: float, across: tuple[float, float], up: tuple[float, float], log: bool) -> None:
        self.left, self.across, self.log = left, across, log
        self.up = (math.log(up[0]), math.log(up[1])) if log else up
        self.top, self.bottom, self.width = 46.0, 340.0, 320.0

    def x(self, value: float) -> float:
        low, high = (math.log(edge) for edge in self.across)
        return self.left + self.width * (math.log(value) - low) / (high - low)

    def y(self, value: float) -> float:
        value = math.log(value) if self.log else value
        return self.bottom - (self.bottom - self.top) * (value - self.up[0]) / (self.up[1] - self.up[0])

    def axes(self, title: str, below: str, ticks: dict[float, str], levels: dict[float, str]) -> list[str]:
        """The frame: what it shows, what runs from left to right, and the marks on both axes."""
        right = self.left + self.width
        parts = [text(self.left, self.top - 24, title, "title")]
        for value, says in levels.items():
            y = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(text(self.left - 8, self.y(value) + 4, says, "small", "end"))
        parts += [text(self.x(value), self.bottom + 18, says, "small", "middle") for value, says in ticks.items()]
        parts.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        parts.append(text(self.left + self.width / 2, self.bottom + 38, below, "small", "middle"))
        return parts

    def curves(self, curves: dict[str, list[Point]], unit: str) -> list[str]:
        """A line for each name, those that stand out above the others."""
        parts = []
        for name in sorted(curves, key=lambda name: base(name) in COLOURS):
            colour, points = COLOURS.get(base(name)), sorted(curves[name])
            line = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y, _, _ in points)
            drawn = f'style="stroke:{colour};fill:none;stroke-width:2"' if colour else 'class="grey"'
            parts.append(f'<polyline {drawn} points="{line}"><title>{escape(name)}</title></polyline>')
            for x, y, low, high in points:
                at = f'x1="{self.x(x):.1f}" x2="{self.x(x):.1f}"'
                if colour and high > low:
                    parts.append(f'<line style="stroke:{colour};stroke-opacity:.5" {at} y1="{self.y(low):.1f}" '
                                 f'y2="{self.y(high):.1f}"/>')  # fmt: skip
                dot = f'style="fill:{colour}"' if colour else 'class="greydot"'
                hint = f"<title>{escape(name)}: {y:.3g} {unit} at {x:,.0f}</title>"
                place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{3.5 if colour else 2.5}"'
                parts.append(f"<circle {dot} {place}>{hint}</circle>")
        return parts


def base(name: str) -> str:
    """The mixer of a form."""
    return name.split("(")[0].split(" ")[0]


def legend(names: set[str], top: float, width: float) -> tuple[list[str], float]:
    """What the colours mean, and where it ends."""
    shown = [name for name in COLOURS if name in {base(each) for each in names}]
    shown += ["others"] if {base(each) for each in names} - set(COLOURS) else []
    parts, across = [], 4
    for number, name in enumerate(shown):
        x, y = 50 + number % across * (width - 60) / across, top + number // across * 22
        mark = f'style="fill:{COLOURS[name]}"' if name in COLOURS else 'class="greydot"'
        parts += [f'<circle {mark} cx="{x:.1f}" cy="{y - 4:.1f}" r="5"/>', text(x + 11, y, name, "small")]
    return parts, top + -(-len(shown) // across) * 22


def in_bytes(count: float) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} TiB"


def powers(low: float, high: float, factor: int) -> list[float]:
    """Powers of a factor from one that is no higher than the least to one that is no lower than the most."""
    first, last = math.floor(math.log(low, factor) + 1e-9), math.ceil(math.log(high, factor) - 1e-9)
    return [float(factor) ** power for power in range(first, max(last, first + 1) + 1)]


def frontier(panel: Panel, points: list[Point]) -> str:
    """A stair: the most that any of them gives from so many bytes or fewer."""
    stairs, best = [], 0.0
    for x, y, _, _ in sorted(points):
        if y > best:
            stairs += [f"{panel.x(x):.1f},{panel.y(best):.1f}", f"{panel.x(x):.1f},{panel.y(y):.1f}"]
            best = y
    stairs.append(f"{panel.left + panel.width:.1f},{panel.y(best):.1f}")
    hint = "<title>the most that is recalled from as many bytes or fewer</title>"
    return f'<polyline class="grey" stroke-width="5" stroke-opacity=".35" points="{" ".join(stairs)}">{hint}</polyline>'


def recall_figure(rows: list[dict[str, Any]]) -> str:
    """Share of values that small models give back, against the bytes of the state that they have them from."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["mixer"], row["width"]].append(row)
    curves: dict[str, list[Point]] = defaultdict(list)
    for (mixer, _), seen in cells.items():
        found = [row["accuracy"] for row in seen]
        name = base(mixer) if len(seen[0]["mixers"]) == 1 else "+".join(seen[0]["mixers"])
        curves[name].append((mean(row["state_bytes"] for row in seen), mean(found), min(found), max(found)))
    held = [point[0] for points in curves.values() for point in points]
    ticks = powers(min(held), max(held), 4)
    panel = Panel(50, (ticks[0], ticks[-1]), (0.0, 1.02), log=False)
    panel.width = 720
    levels = {share: f"{share:.0%}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    shown = {tick: in_bytes(tick) for tick in ticks}
    chance, most = rows[0]["chance"], rows[0]["loads"][-1]
    parts = panel.axes(
        f"Values recalled of {most} pairs, by the bytes held",
        "bytes that the layer holds of a row",
        shown,
        levels,
    )
    parts.append(f'<line class="axis" stroke-dasharray="4 4" x1="50" x2="770" y1="{panel.y(chance):.1f}" '
                 f'y2="{panel.y(chance):.1f}"><title>chance: {chance:.1%}</title></line>')  # fmt: skip
    parts += [frontier(panel, [point for points in curves.values() for point in points])]
    parts += panel.curves(curves, "of the values")
    names, end = legend(set(curves), panel.bottom + 64, 800)
    seeds, steps = len({row["seed"] for row in rows}), rows[0]["steps"]
    note = f"After {steps:,} steps; points of a line: forms and widths. Means, ranges of {seeds} seeds. "
    note += "Broad: the most from so many bytes."
    return svg(800, round(end + 12), [*parts, *names, text(50, end, note, "small")],
               "Recall of pairs against the bytes held, by mixer")  # fmt: skip


def decoding_figure(result: dict[str, Any], batch: int) -> str:
    """Time of a step and bytes held, against the context."""
    rows = [row for row in result["rows"] if (row["what"], row["batch"]) == ("layer", batch) and "error" not in row]
    steps: dict[str, list[Point]] = defaultdict(list)
    held: dict[str, list[Point]] = defaultdict(list)
    kind = "graph_ms" if any("graph_ms" in row for row in rows) else "eager_ms"
    for row in rows:
        if (spent := row.get(kind)) is not None:
            steps[row["mixer"]].append((row["context"], spent, spent, spent))
        held[row["mixer"]].append((row["context"], *[row["state_bytes"]] * 3))
    contexts = sorted({row["context"] for row in rows})
    ticks = {tick: f"{tick // 1024}k" for tick in contexts}
    across = (contexts[0], contexts[-1])
    parts = []
    for left, title, curves, unit in (
        (60, f"Milliseconds a token, batch {batch}", steps, "ms"),
        (470, f"Bytes held, batch {batch}", held, "bytes"),
    ):
        values = [point[1] for points in curves.values() for point in points]
        marks = powers(min(values), max(values), 10 if unit == "ms" else 16)
        levels = {mark: f"{mark:g}" if unit == "ms" else in_bytes(mark) for mark in marks}
        panel = Panel(left, across, (marks[0], marks[-1]), log=True)
        parts += panel.axes(title, "tokens of context", ticks, levels) + panel.curves(curves, unit)
    names, end = legend(set(held), 404, 800)
    how = "kernels of a captured step" if kind == "graph_ms" else "steps of a loop"
    note = f"One layer, {result['heads']} heads of {result['dim']}; {result['device']}, {how}."
    return svg(800, round(end + 12), [*parts, *names, text(50, end, note, "small")],
               "Time and bytes of a decoding step against the context, by mixer")  # fmt: skip


def drawn(results: Path = HERE) -> dict[str, str]:
    """Every figure that there are results for, by the name of its file."""
    found = {}
    if rows := rows_of(results / RECALL):
        found["recall.svg"] = recall_figure(rows)
    for name in DECODING:
        result = json.loads((results / name).read_text(encoding="utf-8")) if (results / name).is_file() else {}
        if any(row["mixer"] == GROWS for row in result.get("rows", [])):
            return {**found, "decoding.svg": decoding_figure(result, batch=1)}
    return found


if __name__ == "__main__":
    write(drawn())
