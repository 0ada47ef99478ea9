"""Draw the figures of docs/weights-results.md from the results beside this script.

    python benchmarks/weights/figures.py            # into docs/figures

Plain SVG, readable on light and dark pages; every number in them stands in the JSON files.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from drawing import rows_of, svg, text, write  # noqa: E402

ACROSS, CELL = 4, 27
MEASURES = {
    "forget accuracy": "answered rightly: to forget",
    "paraphrases accuracy": "in other words",
    "retain accuracy": "answered rightly: to keep",
    "unseen others accuracy": "answered rightly: never seen",
    "membership by loss": "membership, by loss",
    "forget accuracy, 4 bits": "to forget, in four bits",
    "probe": "to forget, read by a probe",
    "back without teaching": "back without teaching",
}
TASKS = {
    "class": "To forget: one class",
    "random": "To forget: a hundred rows at random",
    "elements": "To forget: all about twelve elements",
}
THINGS = {"digits": "digits", "fashion-mnist": "clothes"}
PALETTE = ("#0f766e", "#d97706", "#7c3aed", "#dc2626", "#2563eb", "#65a30d", "#db2777", "#0891b2", "#a16207", "#475569")


def results(name: str) -> list[dict[str, Any]]:
    """The rows of a result that came to an end."""
    return [row for row in rows_of(HERE / name) if "left_out" not in row]


def matrix_figure(stream: str) -> str:
    """One map per learner with its own settings: mean share right on each experience after each."""
    found: dict[str, list[list[list[float]]]] = defaultdict(list)
    rows_held = results(f"retain-{stream}.json")
    for row in rows_held:
        if "=" not in row["learner"]:
            found[row["learner"]].append(row["matrix"])
    means = {name: _mean(matrices) for name, matrices in found.items()}
    order = sorted(means, key=lambda name: mean(means[name][-1]))
    size = len(means[order[0]])
    wide, high = size * CELL + 62, size * CELL + 58
    title = f"Right answers (%) on each pair of {THINGS[stream]} (across) after each was learnt (down)"
    parts = [text(10, 20, title, "title")]
    for number, name in enumerate(order):
        left, top = 14 + number % ACROSS * wide, 62 + number // ACROSS * high
        last = mean(means[name][-1])
        parts.append(text(left, top - 8, f"{name}: {100 * last:.0f}", "small title"))
        for after, scores in enumerate(means[name]):
            for asked, score in enumerate(scores):
                x, y = left + asked * CELL, top + after * CELL
                known = asked <= after
                fill = f'class="cell" fill-opacity="{score:.2f}"' if known else 'class="later"'
                parts.append(f'<rect {fill} x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}"/>')
                if known:
                    ink = "#ffffff" if score > 0.55 else ""
                    parts.append(text(x + CELL / 2, y + CELL / 2 + 4, f"{100 * score:.0f}", "small", "middle", ink))
    rows = -(-len(order) // ACROSS)
    foot = 62 + rows * high - 18
    note = f"Beside each name: the mean of the last row. {_seeds(rows_held)}."
    parts.append(text(14, foot, note, "small"))
    return svg(14 + ACROSS * wide, foot + 14, parts, "Scores on each experience after each, by learner")


def _seeds(rows: list[dict[str, Any]]) -> str:
    count = len({row["seed"] for row in rows})
    return "One seed" if count == 1 else f"Means over {count} seeds"


def _mean(matrices: list[list[list[float]]]) -> list[list[float]]:
    return [[mean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def audit_figure(data: str) -> str:
    """For each task and way of looking: every eraser, the model trained again, and the one before."""
    rows = results(f"erase-{data}.json")
    erasers = list(dict.fromkeys(row["eraser"] for row in rows))
    left, width, line = 220, 520, 15
    parts, at = [], 8.0
    for task, title in TASKS.items():
        chosen = [row for row in rows if row["task"] == task]
        if not chosen:
            continue
        at += 18
        parts.append(text(10, at, title, "title"))
        at += 12
        top = at
        for measure, says in MEASURES.items():
            values = _means(chosen, measure)
            if not values:
                continue
            high = line * len(erasers) * 0.62 + 12
            parts.append(text(left - 12, at + high / 2 + 4, says, "small", "end"))
            some = next(iter(values.values()))
            for subject, mark in (("retrained", "mark"), ("before", "before")):
                x = left + width * some[subject]
                dash = ' stroke-dasharray="3 3"' if mark == "before" else ""
                cls = "axis" if mark == "before" else "mark"
                parts.append(f'<line class="{cls}"{dash} x1="{x:.1f}" x2="{x:.1f}" y1="{at + 2:.1f}" '
                             f'y2="{at + high - 2:.1f}"/>')  # fmt: skip
            for number, eraser in enumerate(erasers):
                if eraser in values:
                    y = at + 8 + number * line * 0.62
                    colour, x = PALETTE[number % len(PALETTE)], left + width * values[eraser]["erased"]
                    hint = f"<title>{escape(eraser)}, {says}: {values[eraser]['erased']:.2f}</title>"
                    parts.append(f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.2">{hint}</circle>')
            at += high
            parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            x = left + width * share
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top:.1f}" y2="{at:.1f}"/>')
            parts.append(text(x, at + 16, f"{share:g}", "small", "middle"))
        at += 30
    for number, eraser in enumerate(erasers):
        x, y = 20 + number % 3 * 250, at + 12 + number // 3 * 20
        parts.append(f'<circle style="fill:{PALETTE[number % len(PALETTE)]}" cx="{x}" cy="{y - 4:.1f}" r="5"/>')
        parts.append(text(x + 11, y, eraser, "small"))
    at += 12 + -(-len(erasers) // 3) * 20 + 4
    note = f"Upright: the model trained again without them; dashed: before. {_seeds(rows)}."
    parts.append(text(10, at, note, "small"))
    return svg(780, int(at + 12), parts, "What remains after erasing, by eraser")


def _means(rows: list[dict[str, Any]], measure: str) -> dict[str, dict[str, float]]:
    """By eraser and model, the mean over seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for subject, value in row["measures"].get(measure, {}).items():
            found[row["eraser"]][subject].append(value)
    return {name: {subject: mean(values) for subject, values in each.items()} for name, each in found.items()}


def language_figure() -> str:
    """For each learner with its own settings, what was learnt of three kinds of text against what a novel lost."""
    rows = results("retain-domains.json")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        gain = row["average"] - mean(row["untrained"])
        found[row["learner"]].append((gain, row["general"][-1] - row["general"][0]))
    points = {name: (mean(g for g, _ in pairs), mean(k for _, k in pairs)) for name, pairs in found.items()}
    left, top, width, high = 70, 44, 640, 300
    (x_low, x_high), (y_low, y_high) = (_bounds([pair[n] for pair in points.values()]) for n in (0, 1))
    parts = [text(10, 22, "What was learnt of three kinds of text, and what that cost elsewhere", "title")]
    for n in range(5):
        x, y = left + width * n / 4, top + high * n / 4
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{top + high}"/>')
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        parts.append(text(x, top + high + 16, f"{x_low + (x_high - x_low) * n / 4:+.2f}", "small", "middle"))
        parts.append(text(left - 8, y + 4, f"{y_high - (y_high - y_low) * n / 4:+.2f}", "small", "end"))
    parts.append(
        text(left + width / 2, top + high + 34, "learnt: nats per token of the three, at the end", "small", "middle")
    )
    parts.append(text(left + 4, top + 14, "kept: nats per token of a novel", "small"))
    for number, (name, (gain, kept)) in enumerate(sorted(points.items(), key=lambda pair: -pair[1][0])):
        colour = PALETTE[number % len(PALETTE)]
        x = left + width * (gain - x_low) / (x_high - x_low)
        y = top + high * (y_high - kept) / (y_high - y_low)
        hint = f"<title>{escape(name)}: {gain:+.2f} learnt, {kept:+.2f} of the novel</title>"
        shape = "" if number < len(PALETTE) else ' stroke="#1f2937" stroke-width="2"'
        parts.append(f'<circle style="fill:{colour}"{shape} cx="{x:.1f}" cy="{y:.1f}" r="6">{hint}</circle>')
        x, y = 20, top + high + 60 + number * 20
        parts.append(f'<circle style="fill:{colour}"{shape} cx="{x}" cy="{y - 4:.1f}" r="5"/>')
        parts.append(text(x + 11, y, f"{name}: {gain:+.2f}, {kept:+.2f}", "small"))
    foot = top + high + 60 + len(points) * 20 + 4
    parts.append(text(10, foot, f"Right: more is learnt; up: more is kept. {_seeds(rows)}.", "small"))
    return svg(740, foot + 12, parts, "What learners teach a language model, and what it loses")


def _bounds(values: list[float]) -> tuple[float, float]:
    """The least and the most, with some room."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1
    return low - room, high + room


def drawn() -> dict[str, str]:
    """The figures of the results that there are."""
    found = {"language": ("retain-domains", language_figure)}
    for name, data in (("", "digits"), ("-fashion", "fashion-mnist"), ("-facts", "facts")):
        found[f"erase{name}"] = (f"erase-{data}", partial(audit_figure, data))
        if data in THINGS:
            found[f"retain{name}"] = (f"retain-{data}", partial(matrix_figure, data))
    return {f"{name}.svg": draw() for name, (held, draw) in found.items() if (HERE / f"{held}.json").is_file()}


if __name__ == "__main__":
    write(drawn())
