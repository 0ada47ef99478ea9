"""Write the tables of quality into layers.md and studies.md, from the results in benchmarks/layers.

Run by hand where there are new results: ``python docs/scripts/quality.py``. A test compares.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, Rows, put, rows_of, table, update

RESULTS = ROOT / "benchmarks" / "layers"
PAGES = (ROOT / "docs" / "layers.md", ROOT / "docs" / "studies.md")
SOFTMAX = "softmax"


def grouped(rows: Rows, key: str) -> dict[str, Rows]:
    """Rows by one of their entries."""
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def seen(values: Sequence[float], form: str) -> str:
    """The mean, and where seeds differ the range."""
    low, high = format(min(values), form), format(max(values), form)
    return format(mean(values), form) + (f" ({low} to {high})" if low != high else "")


def percent(values: Sequence[float]) -> str:
    """The same in percent, as whole numbers."""
    return seen([100 * value for value in values], ".0f")


def recall(rows: Rows, width: int) -> list[str]:
    """One row per mixer of models of that width, by the bytes that it holds."""
    mixers = grouped([row for row in rows if row["width"] == width], "mixer")
    loads = [load for load in rows[0]["accuracy_by_pairs"] if int(load) >= 8]
    lines = [
        [f"`{name}`", f"{found[0]['state_bytes']:,}"]
        + [percent([row["accuracy_by_pairs"][load] for row in found]) for load in loads]
        + [str(len(found))]
        for name, found in sorted(mixers.items(), key=lambda pair: (pair[1][0]["state_bytes"], pair[0]))
    ]
    return table(["mixer", "bytes held", *(f"{load} pairs" for load in loads), "seeds"], lines)


def language(rows: Rows) -> list[str]:
    """One row per mixer, the best first."""
    mixers = sorted(grouped(rows, "mixer").items(), key=lambda pair: mean(row["bits_per_byte"] for row in pair[1]))
    lines = [
        [
            f"`{name}`",
            seen([row["bits_per_byte"] for row in found], ".3f"),
            f"{mean(row['loss'] for row in found):.3f}",
            f"{found[0]['state_bytes']:,}",
            str(len(found)),
        ]
        for name, found in mixers
    ]
    length = rows[0]["length"]
    return table(["mixer", "bits per byte", "nats per token", f"bytes held after {length} tokens", "seeds"], lines)


def hybrids(rows: Rows) -> list[str]:
    """Recall and loss of every mixer in every ratio."""
    metrics = [row["metrics"] for row in rows]
    ratios = sorted({ratio for found in metrics[0].values() for ratio in found}, key=share)
    lines = []
    for what, name, form in (("recall", "pairs recalled, %", percent), ("loss", "nats per byte", seen_loss)):
        for mixer in metrics[0]:
            cells = [
                form([found[mixer][ratio][what] for found in metrics]) if ratio in metrics[0][mixer] else ""
                for ratio in ratios
            ]
            lines.append([f"`{mixer}`", name, *cells])
    return table(["layers", "", *ratios], lines)


def share(ratio: str) -> float:
    """Layers of linear attention for each of softmax."""
    linear, _, full = ratio.partition(":")
    return int(linear) / int(full) if full else float("inf")


def seen_loss(values: Sequence[float]) -> str:
    return seen(values, ".3f")


def conversion(rows: Rows) -> list[str]:
    """What is left after each stage, of every mixer in the place of the same layers."""
    began = [row for row in rows if row["stage"] == "attention"][:1]
    kinds: dict[tuple[str, str, str], Rows] = defaultdict(list)
    for row in rows:
        if row["stage"] != "attention" and (row["mixer"], row["stage"]) != (SOFTMAX, "converted"):
            kinds[row["mixer"], row["layers"], row["stage"]].append(row)
    lines = [["attention", "", "", *scores(began), ""]] if began else []
    for (mixer, layers, stage), found in sorted(kinds.items(), key=lambda pair: order(pair[1][0])):
        lines.append([f"`{mixer}`", layers.replace(",", ", "), stage, *scores(found), str(len(found))])
    heads = ["mixer", "layers", "stage", "nats per token", "at a second reading", "bytes held", "seeds"]
    return table(heads, lines)


def scores(found: Rows) -> list[str]:
    """Loss, loss of a second reading, and bytes."""
    held = f"{found[0]['bytes']:,}" if "bytes" in found[0] else ""
    return [*(seen([row[name] for row in found], ".2f") for name in ("loss", "again")), held]


def order(row: dict[str, Any]) -> tuple[str, int, str, int]:
    """Mixer by mixer, the most layers first, stages in their order."""
    stage = ("converted", "matched", "tuned").index(row["stage"])
    return row["mixer"], -held_layers(row["layers"]), row["layers"], stage


def held_layers(layers: str) -> int:
    """How many a text as ``0,2-5`` names."""
    parts = [part.partition("-") for part in layers.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in parts)


TABLES: dict[str, tuple[Callable[[Rows], list[str]], str]] = {
    "recall": (partial(recall, width=64), "quality-recall.jsonl"),
    "recall-32": (partial(recall, width=32), "quality-recall.jsonl"),
    "language": (language, "quality-language.jsonl"),
    "hybrids": (hybrids, "hybrids-full.jsonl"),
    "conversion": (conversion, "conversion-h100.json"),
}


def written(page: str) -> str:
    """The page with the tables of now."""
    for name, (lines_of, place) in TABLES.items():
        if rows := rows_of(RESULTS / place):
            page = put(page, name, lines_of(rows))
    return page


if __name__ == "__main__":
    update(PAGES, written)
