"""Draw the figures of docs/choosing.md from the results beside this script.

    python benchmarks/context/figures.py            # into docs/figures; those of the catalogue: benchmarks/figures.py

Plain SVG, readable on light and dark pages; every number in them stands in the JSON files.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from drawing import rows_of, svg, text, write  # noqa: E402

LENGTH = 512
KEEP_ALL = ("recycled-attention", "tidal-decode", "longheads", "act")  # what holds every entry as it is is not drawn

# What stands out; everything else is drawn in grey and named in the caption.
COLOURS = {
    "duo-attention": "#0f766e",
    "razor-attention": "#65a30d",
    "moa": "#0891b2",
    "streaming-llm": "#d97706",
    "h2o": "#dc2626",
    "a2sf": "#c026d3",
    "snapkv": "#7c3aed",
    "expected-attention": "#2563eb",
    "quantised-cache": "#db2777",
}


def quality() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By task and policy: share of the full cache's bytes, and the mean score over the seeds, by rising bytes."""
    rows = rows_of(HERE / "quality.jsonl")
    cells: dict[tuple[str, str, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        metrics = row["metrics"]
        if row["task"]["length"] == LENGTH and metrics["policy"] not in KEEP_ALL:
            cells[row["task"]["name"], metrics["policy"], metrics["budget"]].append((row["kv_bytes"], metrics["score"]))
    whole = {task: mean(held for held, _ in cells[task, "full", LENGTH]) for task in ("needle", "perplexity")}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {task: defaultdict(list) for task in whole}
    seeds = {task: len(cells[task, "full", LENGTH]) for task in whole}
    for (task, policy, _), seen in cells.items():
        if task in whole and len(seen) == seeds[task]:  # a mean of fewer texts is no point of the same curve
            point = (mean(held for held, _ in seen) / whole[task], mean(score for _, score in seen))
            curves[task][policy.split(",")[0]].append(point)
    return {task: {policy: sorted(points) for policy, points in found.items()} for task, found in curves.items()}


def panel(
    curves: dict[str, list[tuple[float, float]]],
    left: float,
    title: str,
    low: float,
    high: float,
    ticks: list[float],
    colours: dict[str, str] = COLOURS,
    top: float = 46.0,
    bottom: float = 330.0,
    width: float = 330.0,
) -> list[str]:

    def x(share: float) -> float:
        return left + width * share / 1.1

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [text(left, top - 24, title, "title")]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(left - 8, y(tick) + 4, f"{tick:g}", "small", "end"))
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        parts.append(text(x(share), bottom + 18, f"{share:.0%}", "small", "middle"))
    parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(text(left + width / 2, bottom + 38, "bytes held, of the full cache", "small", "middle"))
    whole = curves["full"][0][1]
    parts.append(f'<line class="axis" stroke-dasharray="4 4" x1="{left}" x2="{left + width}" y1="{y(whole):.1f}" '
                 f'y2="{y(whole):.1f}"/>')  # fmt: skip
    for policy in sorted(curves, key=lambda name: name in colours):
        colour = colours.get(policy)
        points = [(share, score) for share, score in curves[policy] if score <= high]  # what the frame has room for
        line = " ".join(f"{x(share):.1f},{y(score):.1f}" for share, score in points)
        drawn = f'style="stroke:{colour};fill:none;stroke-width:2"' if colour else 'class="grey"'
        parts.append(f'<polyline {drawn} points="{line}"><title>{escape(policy)}</title></polyline>')
        for share, score in points:
            dot = f'style="fill:{colour}"' if colour else 'class="greydot"'
            hint = f"<title>{escape(policy)}: {score:.2f} at {share:.0%}</title>"
            parts.append(f'<circle {dot} cx="{x(share):.1f}" cy="{y(score):.1f}" r="3.5">{hint}</circle>')
    return parts


def quality_figure() -> str:
    curves = quality()
    parts = panel(curves["needle"], 50, "Needles found, question unknown", 0.0, 1.05, [0, 0.25, 0.5, 0.75, 1])
    parts += panel(curves["perplexity"], 450, "Perplexity of the next 256 tokens", 12.0, 20.0, [12, 14, 16, 18, 20])
    drawn = [policy for policy in COLOURS if any(policy in found for found in curves.values())]
    across = 5
    for number, policy in enumerate([*drawn, "others"]):
        column, row = number % across, number // across
        left, base = 50 + column * 152, 396 + row * 22
        mark = f'style="fill:{COLOURS[policy]}"' if policy in COLOURS else 'class="greydot"'
        parts.append(f'<circle {mark} cx="{left}" cy="{base - 4}" r="5"/>')
        parts.append(text(left + 11, base, policy, "small"))
    return svg(800, 430, parts, "Quality against bytes held, SmolLM2, 512 tokens")


def decode_figure() -> str:
    rows = [row for row in rows_of(HERE / "decode.json") if row["batch"] in (1, 12)]
    longest = max(row["ms"] for row in rows if row["batch"] == 1)
    parts = [text(10, 22, "Milliseconds a decoding step, 32,768 tokens of context", "title")]
    at = 50.0
    for batch in (1, 12):
        chosen = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["ms"])
        longest = max(row["ms"] for row in chosen)
        parts.append(text(10, at, f"batch {batch}", "small title"))
        at += 10
        for row in chosen:
            wide = 420 * row["ms"] / longest
            floor = 300 + 420 * row["floor_ms"] / longest
            cls = "peer" if row["what"].startswith("compiled static") else "bar"
            parts.append(text(290, at + 14, f"{row['what']}, {row['held']:,} entries", "small", "end"))
            parts.append(f'<rect class="{cls}" x="300" y="{at:.0f}" width="{wide:.1f}" height="18" rx="2"/>')
            parts.append(
                f'<line class="floor" x1="{floor:.1f}" x2="{floor:.1f}" y1="{at - 2:.0f}" y2="{at + 20:.0f}"/>'
            )
            parts.append(text(306 + wide, at + 14, f"{row['ms']:.1f}", "small"))
            at += 26
        at += 22
    note = "Red: the time that the bytes alone need (weights and kept cache over the measured copy bandwidth)."
    parts.append(text(10, at, note, "small"))
    return svg(800, int(at + 14), parts, "Milliseconds a decoding step")


def drawn() -> dict[str, str]:
    """The figures, by the names of their files."""
    return {"quality.svg": quality_figure(), "decode.svg": decode_figure()}


if __name__ == "__main__":
    write(drawn())
