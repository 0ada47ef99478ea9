"""Write the tables of learners and erasers into weights.md, from the results in benchmarks/weights.

Run by hand where there are new results: ``python docs/scripts/weights.py``. A test compares.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "weights", ROOT / "docs" / "weights.md"
STREAMS = {"digits": "Split digits", "fashion-mnist": "Split Fashion-MNIST"}
TASKS = {"class": "one class", "random": "a hundred rows at random"}
NEAR = 0.1  # of the model trained again: as the certificate of erasers asks for


def rows_of(kind: str, name: str) -> list[dict[str, Any]]:
    """The rows of a result; none where it was not run."""
    place = RESULTS / f"{kind}-{name}.json"
    return json.loads(place.read_text())["rows"] if place.is_file() else []


def spread(values: list[float], form: str = ".2f") -> str:
    """The mean, with the least and the most."""
    between = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{between}"


def held(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.0f} GB"


def retain_table(stream: str) -> list[str]:
    """One row per learner, those first that know most at the end."""
    by_learner: dict[str, list[dict[str, Any]]] = defaultdict(list)
    left_out = {}
    for row in rows_of("retain", stream):
        if "left_out" in row:
            left_out[row["learner"]] = row["left_out"]
        else:
            by_learner[row["learner"]].append(row)
    plain = {row["seed"]: row["average"] for row in by_learner["finetune"]}
    head = ["| learner | at the end | forgetting | just after learning | what was known before | held | verdict |"]
    head.append("|---|---|---|---|---|---|---|")
    lines = []
    for name, rows in sorted(by_learner.items(), key=lambda pair: -mean(r["average"] for r in pair[1])):
        better = sum(row["average"] > plain[row["seed"]] for row in rows)
        verdict = "" if name in ("finetune", "joint") else f"above fine-tuning: {better} of {len(rows)} seeds"
        cells = [
            f"`{name}`",
            spread([row["average"] for row in rows]),
            spread([row["forgetting"] for row in rows]),
            f"{mean(row['plasticity'] for row in rows):.2f}",
            f"{mean(row['general_kept'] for row in rows):+.2f}",
            held(mean(row["replay_bytes"] + row["state_bytes"] for row in rows)),
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"Not on this stream: {'; '.join(f'`{n}` ({why})' for n, why in left_out.items())}."] if left_out else []
    return [f"**{STREAMS[stream]}**", "", *head, *lines, *([""] if notes else []), *notes]


def erase_table(data: str, task: str) -> list[str]:
    """One row per eraser, those first that are nearest to training again; then that, and the model before."""
    by_eraser: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of("erase", data):
        if row["task"] == task and "left_out" not in row:
            by_eraser[row["eraser"]].append(row["measures"])
    if not by_eraser:
        return []
    head = ["| eraser | to forget | to keep | never seen | unseen, alike | membership | steps to relearn | verdict |"]
    head.append("|---|---|---|---|---|---|---|---|")
    some = next(iter(by_eraser.values()))
    lines = [
        _erased(f"`{name}`", measures, "erased", verdict(measures))
        for name, measures in sorted(by_eraser.items(), key=lambda pair: gap(pair[1]))
    ]
    lines += [_erased(f"*{name}*", some, name, "") for name in ("retrained", "before")]
    return [f"**To forget: {TASKS[task]}** ({STREAMS[data].removeprefix('Split ')})", "", *head, *lines]


SHOWN = ("forget accuracy", "retain accuracy", "unseen others accuracy", "unseen accuracy", "membership by loss")


def _erased(name: str, measures: list[dict[str, Any]], which: str, says: str) -> str:
    cells = [spread([m[shown][which] for m in measures]) for shown in SHOWN]
    steps = [m["steps to relearn"][which] for m in measures]
    cells.append(", ".join("none" if step is None else f"{step:.0f}" for step in steps))
    return f"| {' | '.join([name, *cells, says])} |"


def gap(measures: list[dict[str, Any]]) -> float:
    """The mean distance from the model trained again, over what the table shows."""
    return mean(abs(m[shown]["erased"] - m[shown]["retrained"]) for m in measures for shown in SHOWN)


def verdict(measures: list[dict[str, Any]]) -> str:
    """In words, whether on every seed it is within a tenth of the model trained again."""
    known = sum(m["forget accuracy"]["erased"] > m["forget accuracy"]["retrained"] + NEAR for m in measures)
    under = sum(m["forget accuracy"]["erased"] < m["forget accuracy"]["retrained"] - NEAR for m in measures)
    lost = sum(
        any(m[kept]["erased"] < m[kept]["retrained"] - NEAR for kept in ("retain accuracy", "unseen others accuracy"))
        for m in measures
    )
    said = {"still known": known, "forgotten more than by training again": under, "others lost": lost}
    found = [f"{what} ({count} of {len(measures)})" for what, count in said.items() if count]
    return "; ".join(found) or "as trained again"


def tables() -> dict[str, list[str]]:
    """What stands between the marks of the page."""
    retain = [retain_table(stream) for stream in STREAMS if rows_of("retain", stream)]
    erase = [erase_table(data, task) for data in STREAMS if rows_of("erase", data) for task in TASKS]
    found = {"retain": retain, "erase": [part for part in erase if part]}
    return {name: _joined(parts) for name, parts in found.items() if parts}


def _joined(parts: list[list[str]]) -> list[str]:
    return [line for number, part in enumerate(parts) for line in ([""] if number else []) + part]


def written(page: str) -> str:
    """The page with the tables of now."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = "\n".join([f"{before}{begin}", "", *lines, "", end]) + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
