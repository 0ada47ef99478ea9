"""Draw a figure for every method that was measured here, for its place in the catalogue.

    python benchmarks/figures.py            # into docs/figures/methods

Cache policies: needles and perplexity against bytes (context/quality.jsonl). Mixers: what small models of them learn
(layers/recall.jsonl, the ledger of ``vestige compare examples/compare-layers.yaml``). Studies: every
finding beside what was due (studies/NAME.jsonl, the ledger of ``vestige study NAME``). Learners and erasers: what is
left of images learnt (weights/retain-*.json, erase-*.json). All others: what the behaviour
checks of their certificates saw, each seed (certificates/NAME.json). Narrow plain SVG, readable on light and dark pages
and on a telephone.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from context.figures import KEEP_ALL, panel, quality
from drawing import OUT, rows_of, svg, text, write

from vestige.evidence.points import Point, points_of
from vestige.evidence.studies.study import Finding, study_named

HERE = Path(__file__).parent
WIDTH = 480
OWN, WRONG = "#0f766e", "#dc2626"
SHADES = (OWN, "#d97706")  # of the forms in which a policy was measured
STREAMS = {"Digits": "retain-digits.json", "Clothes": "retain-fashion-mnist.json"}
ERASURES = {"Digits": "erase-digits.json", "Clothes": "erase-fashion-mnist.json"}
ERASED = {
    "to forget": "forget accuracy",
    "to keep": "retain accuracy",
    "never seen": "unseen others accuracy",
}
TASKS = {"mqar": "recall of pairs", "last-write-wins": "the last value counts", "state-tracking": "parity"}


def policies() -> Iterator[tuple[str, str]]:
    """Each policy among the others: needles above, perplexity below where it was measured."""
    curves = quality()
    known = sorted({name for found in curves.values() for name in found} - {"full", *KEEP_ALL})
    for policy in dict.fromkeys(name.split("(")[0] for name in known):
        own = {name: SHADES[n] for n, name in enumerate(n for n in known if n.split("(")[0] == policy)}
        height, parts = 0.0, []
        size = {"left": 44, "width": WIDTH - 60, "colours": own}
        if any(name in curves["needle"] for name in own):
            scale = {"low": 0.0, "high": 1.05, "ticks": [0, 0.25, 0.5, 0.75, 1]}
            title = f"Needles found, question unknown: {policy}"
            parts += panel(curves["needle"], title=title, top=42, bottom=200, **scale, **size)  # type: ignore[arg-type]
            height = 250
        if any(name in curves["perplexity"] for name in own):
            scale = {"low": 12.0, "high": 20.0, "ticks": [12, 14, 16, 18, 20]}
            title, top = f"Perplexity of the next 256 tokens: {policy}", height + 42
            parts += panel(curves["perplexity"], title=title, top=top, bottom=top + 158, **scale, **size)  # type: ignore[arg-type]
            height += 250
        if len(own) > 1:
            for number, (name, colour) in enumerate(own.items()):
                parts.append(text(44 + 150 * number, height + 6, name, "small title", fill=colour))
            height += 18
        parts.append(text(44, height + 6, "grey: other policies; dashed: the whole cache", "small"))
        yield policy, svg(WIDTH, round(height + 16), parts, f"{policy}: quality against bytes held, SmolLM2")


def readers(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Each policy that holds everything and reads few of it, among the others: needles found, by length."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        length, told = row["task"]["length"], row["metrics"]
        whole = told["budget"] in (length // 2, length)  # what is read of the text: half, or all
        if row["task"]["name"] == "needle" and told["policy"] in KEEP_ALL and whole:
            found.setdefault(length, {}).setdefault(told["policy"], []).append(told["score"])
    for name in dict.fromkeys(name for of in found.values() for name in of):
        parts = [text(10, 22, f"Needles found, half of the entries read: {name}", "title")]
        lengths = sorted(found)
        for number, length in enumerate(lengths):
            parts += _among(f"{length:,} tokens", found[length], name, 50 + 26 * number)
        yield name, _signed(name, parts, 50 + 26 * len(lengths), "needles found")


def mixers(rows: list[dict]) -> Iterator[tuple[str, str]]:
    """Each mixer among the others, a line per task."""
    groups = [(task, points) for (_, task, _), points in points_of(rows).groups()]
    left, width = 150, WIDTH - 180

    def x(value: float) -> float:
        return left + width * value

    def line(task: str, points: list[Point], mixer: str, y: float) -> list[str]:
        parts = [text(left - 12, y + 4, TASKS[task.split(" ")[0]], "small", "end")]
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
        chance = points[0].chance or 0.0
        parts.append(f'<line class="axis" stroke-dasharray="2 3" x1="{x(chance):.1f}" x2="{x(chance):.1f}" '
                     f'y1="{y - 10}" y2="{y + 10}"><title>chance: {chance:.0%}</title></line>')  # fmt: skip
        for point in sorted(points, key=lambda point: point.method == mixer):
            found, own = point.interval, point.method == mixer
            hint = f"<title>{point.method}: {point.value_text}</title>"
            if own:
                parts.append(f'<line style="stroke:{OWN};stroke-width:3" x1="{x(found.low):.1f}" '
                             f'x2="{x(found.high):.1f}" y1="{y}" y2="{y}"/>')  # fmt: skip
            mark = f'style="fill:{OWN}" r="6"' if own else 'class="greydot" r="3.5"'
            parts.append(f'<circle {mark} cx="{x(found.value):.1f}" cy="{y}">{hint}</circle>')
        return parts

    names = {point.method: point.spec["name"] for _, points in groups for point in points}
    for mixer, name in names.items():
        parts = [text(10, 22, f"Right answers of small models: {mixer}", "title")]
        for number, (task, points) in enumerate(groups):
            parts += line(task, points, mixer, 52 + 34 * number)
        base = 52 + 34 * len(groups)
        parts += [text(x(share), base, f"{share:.0%}", "small", "middle") for share in (0, 0.5, 1)]
        parts.append(text(10, base + 24, "bar: 95% interval; grey: other mixers; dotted: chance", "small"))
        yield name, svg(WIDTH, base + 34, parts, f"{mixer}: what small models of it learn")


def findings(name: str, rows: list[dict]) -> str:
    """A study's findings: each seed, and where it was due."""
    study = study_named(name).from_spec(rows[0]["method"])
    parts, y = [text(10, 22, "What was due (green), and what each seed gave", "title")], 48.0
    for finding in study.findings([row["metrics"] for row in sorted(rows, key=lambda row: row["seed"])]):
        for words in textwrap.wrap(finding.claim, 68):
            parts.append(text(10, y, words, "small"))
            y += 16
        parts += _track(finding, y + 4)
        y += 42
    return svg(WIDTH, round(y), parts, f"{name}: findings")


def _track(finding: Finding, y: float) -> list[str]:
    left, width = 10, WIDTH - 190
    bounds = [bound for bound in (finding.at_least, finding.at_most) if bound is not None]
    known = [*finding.measured, *bounds, 0.0]
    low, high = min(known), max(known)
    high = high if high > low else low + 1

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low)

    first = x(low if finding.at_least is None else finding.at_least)
    last = x(high if finding.at_most is None else finding.at_most)
    colour = OWN if finding.held else WRONG
    told = f"{min(finding.measured):.2g} to {max(finding.measured):.2g}"
    parts = [
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>',
        f'<rect style="fill:{OWN};opacity:.25" x="{first:.1f}" width="{max(2.0, last - first):.1f}" '
        f'y="{y - 7}" height="14"/>',
    ]
    parts += [f'<circle style="fill:{colour}" cx="{x(value):.1f}" cy="{y}" r="4.5"/>' for value in finding.measured]
    verdict = text(left + width + 10, y + 4, told if finding.held else f"{told}: not held", "small")
    return [*parts, verdict]


def learners() -> Iterator[tuple[str, str]]:
    """Each learner among the others: right answers at the end of a stream, and how much was forgotten."""
    found = {title: _by_method(file, "learner") for title, file in STREAMS.items()}
    for name in dict.fromkeys(label.split(" ")[0] for rows in found.values() for label in rows):
        parts, y = [text(10, 22, f"After learning two classes at a time: {name}", "title")], 36.0
        for title, rows in found.items():
            parts.append(text(10, y + 20, title, "small title"))
            for number, (says, field) in enumerate((("right at the end", "average"), ("forgotten", "forgetting"))):
                values = {label: [row[field] for row in of] for label, of in rows.items()}
                parts += _among(says, values, name, y + 44 + 26 * number)
            y += 84
        yield name, _signed(name, parts, y, "what is left of a stream")


def erasers() -> Iterator[tuple[str, str]]:
    """Each eraser among the others: right answers on what was to be forgotten, on what was to be kept, and unseen."""
    found = {
        f"{title}, {what}": {
            name: [r for r in rows if r["task"] == task] for name, rows in _by_method(file, "eraser").items()
        }
        for title, file in ERASURES.items()
        for task, what in (("class", "one class"), ("random", "100 at random"))
    }
    for name in dict.fromkeys(label.split(" ")[0] for rows in found.values() for label in rows):
        parts, y = [text(10, 22, f"Right answers after erasing: {name}", "title")], 36.0
        for title, rows in found.items():
            parts.append(text(10, y + 20, title, "small title"))
            for number, (says, measure) in enumerate(ERASED.items()):
                values, due = {}, []
                for label, of in rows.items():
                    seen = [row["measures"][measure] for row in of if measure in row["measures"]]
                    values[label] = [one["erased"] for one in seen]
                    due += [one["retrained"] for one in seen]
                parts += _among(says, values, name, y + 44 + 26 * number, due)
            y += 36 + 26 * len(ERASED) + 8
        yield (
            name,
            _signed(name, parts, y, "what is left after erasing", "dashed: trained anew without them"),
        )


def _by_method(file: str, field: str) -> dict[str, list[dict]]:
    """The rows of each method that came to an end, by name and settings."""
    found: dict[str, list[dict]] = {}
    for row in rows_of(HERE / "weights" / file):
        if "left_out" not in row and "error" not in row:
            found.setdefault(row[field], []).append(row)
    return found


def _among(says: str, values: dict[str, list[float]], name: str, y: float, due: Sequence[float] = ()) -> list[str]:
    """Shares of one: those of a method with its own settings, seed by seed, and the means of all others in grey."""
    left, width = 138, WIDTH - 138 - 112
    parts = [text(left - 12, y + 4, says, "small", "end"),
             f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>']  # fmt: skip

    def x(value: float) -> float:
        return left + width * min(1.0, max(0.0, value))

    if due:
        parts.append(f'<line class="axis" stroke-dasharray="2 3" x1="{x(mean(due)):.1f}" x2="{x(mean(due)):.1f}" '
                     f'y1="{y - 10}" y2="{y + 10}"/>')  # fmt: skip
    for label, found in values.items():
        if label != name and found:
            kin = label.startswith(f"{name} ")
            mark = f'style="fill:none;stroke:{OWN};stroke-width:1.5" r="4.5"' if kin else 'class="greydot" r="3.5"'
            parts.append(f'<circle {mark} cx="{x(mean(found)):.1f}" cy="{y}">'
                         f"<title>{label}: {mean(found):.0%}</title></circle>")  # fmt: skip
    own = values.get(name, [])
    parts += [f'<circle style="fill:{OWN}" fill-opacity=".75" r="5" cx="{x(one):.1f}" cy="{y}"/>' for one in own]
    told = " to ".join(dict.fromkeys(f"{one:.0%}" for one in (min(own), max(own)))) if own else "not measured"
    return [*parts, text(left + width + 10, y + 4, told, "small")]


def _signed(name: str, parts: list[str], y: float, what: str, also: str = "") -> str:
    parts.append(text(10, y + 14, "each seed a dot; rings: means with other settings; grey: of other methods", "small"))
    if also:
        y += 16
        parts.append(text(10, y + 14, also, "small"))
    return svg(WIDTH, round(y + 26), parts, f"{name}: {what}")


def certified(certificate: dict) -> str | None:
    """What the behaviour checks of a method saw, a line for each quantity; ``None`` where they saw no numbers."""
    name = certificate["method"]["name"]
    parts, y = [text(10, 22, f"What was seen of {name}, each seed a dot", "title")], 30.0
    for check in certificate["checks"]:
        numbers = {label: found for label, value in check["seen"].items() if (found := _numbers(value))}
        if check["point"] != "behaviour" or not numbers:
            continue
        y += 22
        for words in textwrap.wrap(check["says"], 68):
            parts.append(text(10, y, words, "small"))
            y += 16
        for number, (label, values) in enumerate(numbers.items()):
            parts += _dots(label, values, _reach(values, numbers), y + 8, OWN if number == 0 else "#6b7280")
            y += 24
    if y == 30.0:
        return None
    note = f"{certificate['model']} model, CPU, torch {certificate['packages']['torch']}"
    parts.append(text(10, y + 20, note, "small"))
    return svg(WIDTH, round(y + 32), parts, f"{name}: what its certificate saw")


def _numbers(value: Any) -> list[float]:
    """One number, several, or several in one text; nothing where it is something else."""
    try:
        several = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [float(one) for one in several if not isinstance(one, bool)]
    except (TypeError, ValueError):
        return []


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _reach(values: list[float], numbers: dict[str, list[float]]) -> tuple[float, float]:
    """The ends of a quantity's axis: those that it shares with the quantities of its order of magnitude."""
    most = max(map(abs, values))
    alike = [one for found in numbers.values() if most / 20 <= max(map(abs, found)) <= 20 * most for one in found]
    low, high = min(0.0, *alike, 0.0), max(0.0, *alike, 0.0)
    return low, high if high > low else low + 1


def _dots(label: str, values: list[float], reach: tuple[float, float], y: float, colour: str) -> list[str]:
    left, width = 168, WIDTH - 168 - 112
    low, high = reach
    seen = " to ".join(dict.fromkeys(_short(value) for value in (min(values), max(values))))
    parts = [
        text(left - 10, y + 4, textwrap.shorten(label, 27, placeholder="…"), "small", "end"),
        f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>',
        text(left + width + 10, y + 4, seen, "small"),
    ]
    for value in values:
        x = left + width * (value - low) / (high - low)
        parts.append(f'<circle style="fill:{colour}" fill-opacity=".75" cx="{x:.1f}" cy="{y}" r="4.5"/>')
    return parts


def main() -> None:
    drawn = [*policies(), *mixers(rows_of(HERE / "layers" / "recall.jsonl"))]
    drawn += [(path.stem, findings(path.stem, rows_of(path))) for path in sorted((HERE / "studies").glob("*.jsonl"))]
    known = {name for name, _ in drawn}
    drawn += [(name, figure) for name, figure in (*learners(), *erasers()) if name not in known]
    known = {name for name, _ in drawn}
    for path in sorted((HERE / "certificates").glob("*.json")):
        if path.stem not in known and (figure := certified(json.loads(path.read_text(encoding="utf-8")))):
            drawn.append((path.stem, figure))
            known.add(path.stem)
    drawn += [pair for pair in readers(rows_of(HERE / "context" / "quality.jsonl")) if pair[0] not in known]
    write({f"{name}.svg": figure for name, figure in drawn}, OUT / "methods")


if __name__ == "__main__":
    main()
