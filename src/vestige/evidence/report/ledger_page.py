"""The page of ledgers: quality against bytes and seconds, forgetting, erasure, heads, and every row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige.core.files import write_whole
from vestige.core.packages import need
from vestige.evidence.amounts import size
from vestige.evidence.ledgers import Read, read_ledgers
from vestige.evidence.points import Group, Point, better, difference, points_of, shown
from vestige.evidence.report.figures import head_map
from vestige.evidence.report.page import (
    Answers,
    Figure,
    Figures,
    Page,
    Record,
    Records,
    Section,
    Table,
    Text,
    versions_line,
    write_page,
)
from vestige.evidence.report.quality_figures import Cost, bytes_cost, matrix_figure, quality_figure, seconds_cost

if TYPE_CHECKING:
    from vestige.evidence.points import Points

__all__ = ["ledger_page", "markdown", "report"]

Row = Mapping[str, Any]
MOST_ANSWERS = 8


def report(
    ledgers: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str] = "vestige-report.html",
    markdown_to: str | os.PathLike[str] | None = None,
) -> Read:
    """Write the page of one or several ledgers, and a summary in Markdown if asked for.

    Args:
        ledgers: files, or folders that hold a ``ledger.jsonl``.
        out: the page; an existing one is replaced when the new one is whole.
        markdown_to: a file for the summary.

    Raises:
        SpecError: no such ledger, one without rows, or one of a version that cannot be read here.
        MissingPackageError: a package that draws the page is absent.
    """
    need("the report", "report", "jinja2", "plotly")
    read = read_ledgers([ledgers] if isinstance(ledgers, str | os.PathLike) else ledgers)
    write_page(ledger_page(read), out)
    if markdown_to is not None:
        write_whole(markdown_to, markdown(read))
    return read


def ledger_page(read: Read) -> Page:
    """The page of what was read."""
    points = points_of(read.rows)
    names = {point: f"p{place}" for place, point in enumerate(points.all)}
    models = sorted({str(row["model"]) for row in read.rows if row.get("model")})
    sections = [
        Section("answers", "In short", [Answers(_answers(points, read.rows))]),
        Section("bytes", "Quality against bytes", _quality(points, names, bytes_cost, "bytes")),
        Section("seconds", "Quality against seconds", _quality(points, names, seconds_cost, "seconds")),
        Section("forgetting", "Forgetting", _forgetting(read.rows)),
        Section("erasure", "Erasure", _erasure(read.rows)),
        Section("heads", "Heads", _heads(read.rows)),
        Section("failed", "What failed", _failed(read.rows)),
        Section("rows", "Every row", [*map(Text, read.notes), _records(read.rows, points, names)]),
    ]
    on = f" on {', '.join(models)}" if models else ""
    return Page(
        title="What the ledger says",
        subtitle=f"{len(read.rows):,} measurements{on}, from {_files(read.rows)}.",
        sections=[section for section in sections if section.blocks and not _empty(section)],
        footer=f"{versions_line()} The page was made of the ledger's rows alone.",
    )


def markdown(read: Read) -> str:
    """A summary for a pull request: a table per task, what failed, and what was left out."""
    points, lines = points_of(read.rows), ["## Vestige: what the ledger says", ""]
    lines += [f"- **{number}** {sentence}" for number, sentence in _answers(points, read.rows)]
    for (model, task, metric), group in points.groups():
        columns, rows, _ = _numbers(group, {})
        lines += ["", f"### {task} on {model} ({metric})", "", _line(columns), _line("---" for _ in columns)]
        lines += [_line(row) for row in rows]
    failed = _unsettled(read.rows)
    if failed:
        lines += ["", "### What failed", ""]
        lines += [f"- {_method_name(row)}, seed {row['seed']}: {row['error']['text']}" for row in failed]
    if read.notes:
        lines += ["", *(f"_{note}._" for note in read.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _answers(points: Points, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The headline answers: of each task and budget the best method, and whether the next is really worse."""
    told = []
    for group, own in points.groups():
        budgets = dict.fromkeys(point.budget for point in own if point.budget)
        for budget in budgets or [""] * (len(own) > 1):  # what has no budgets compares as it stands
            told.append(_best(group, [point for point in own if point.budget == budget]))
    if len(told) > MOST_ANSWERS:
        rest = len(told) - MOST_ANSWERS
        told = [*told[:MOST_ANSWERS], (f"+ {rest}", "more answers stand in the tables below.")]
    failed = _unsettled(rows)
    if failed:
        told.append((f"{len(failed)} failed", "cells could not be measured; what went wrong is told below."))
    return told or [(f"{len(rows):,}", "rows; none of them is a comparison under budgets. They stand below.")]


def _best(group: Group, own: Sequence[Point]) -> tuple[str, str]:
    model, task, metric = group
    ranked = sorted(own, key=better, reverse=True)
    first = ranked[0]
    at = f" at {first.budget}" if first.budget else ""
    what = f"{task} on {model}: {first.method}{at}, {size(first.kv_bytes)} per context"
    if len(ranked) == 1:
        return shown(first.value, metric), f"{what}; nothing else was measured there."
    gap = difference(first, ranked[1])
    sure = (
        f"clearly ahead of {ranked[1].method} ({shown(ranked[1].value, metric)})"
        if gap.low > 0
        else f"not resolved from {ranked[1].method} ({shown(ranked[1].value, metric)}) with {gap.count} examples"
    )
    return shown(first.value, metric), f"{what}; {sure}."


def _quality(points: Points, names: Mapping[Point, str], cost: Cost, anchor: str) -> list[Any]:
    """A figure and, beside bytes, the numbers, for each task and model."""
    blocks: list[Any] = []
    methods = dict.fromkeys(point.method for point in points.all if point.method != "full")
    series = {"full": 0} | {method: place for place, method in enumerate(methods, start=1)}
    for place, ((model, task, metric), own) in enumerate(points.groups()):
        if any(cost.of(point) for point in own):  # what costs nothing anywhere is no choice
            seen = {point.machine for point in own}
            measured = f" Measured on {' and '.join(sorted(seen))}." if cost is seconds_cost else ""
            blocks.append(
                Figure(
                    f"{anchor}-{place}",
                    quality_figure(own, cost, names, series),
                    f"{task} on {model}",
                    "Bars: 95% intervals over examples and seeds. The broad grey line is the Pareto front: for each "
                    f"amount the best that was measured within it. A point leads to its rows.{measured}",
                    f"Chart of {metric} against {cost.title} for {len({p.method for p in own})} methods.",
                )
            )
        if cost is bytes_cost:
            columns, rows, leads = _numbers(own, names)
            labels = 1 + ("budget" in columns)
            blocks.append(Table(columns, rows, f"{task} on {model}: {metric}", labels=labels, points=leads))
    return blocks


def _numbers(own: Sequence[Point], names: Mapping[Point, str]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows, and the point of each row."""
    whole = next((point.kv_bytes for point in own if point.method == "full"), None)
    columns = ["method", "budget", "value (95% interval)", "bytes", "of full", "ms per token", "examples", "seeds"]
    rows = [
        [
            point.method,
            point.budget or "none",
            point.value_text,
            point.bytes_text,
            f"{point.kv_bytes / whole:.0%}" if whole else "",
            point.time_text,
            str(len(point.values)),
            str(point.seeds),
        ]
        for point in own
    ]
    told = [n for n in range(len(columns)) if any(row[n] not in ("", "none") for row in rows)]
    chosen = [[row[n] for n in told] for row in rows]  # no column without a word
    return [columns[n] for n in told], chosen, [names[point] for point in own if point in names]


def _forgetting(rows: Sequence[Row]) -> list[Any]:
    """The matrices of runs that learnt one experience after the other; seeds of one learner as a mean."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("matrix"):
            same = [row.get("method"), row.get("model"), row.get("unit"), np.shape(row["matrix"]), row.get("names")]
            together.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    figures, table = [], []
    told = [n for n in _LEARNING if any(n in row["metrics"] for own in together.values() for row in own)]
    for place, own in enumerate(together.values()):
        first, seeds = own[0], len({row.get("seed") for row in own})
        matrix = np.mean([row["matrix"] for row in own], axis=0)
        names = first.get("names") or [str(number + 1) for number in range(matrix.shape[1])]
        unit, method = first.get("unit", "accuracy"), _method_name(first)
        spoken = f"{method}: scores on {matrix.shape[1]} experiences after each of {len(matrix)} was learnt."
        figures.append(
            Figure(
                f"matrix-{place}", matrix_figure(matrix, names, unit), f"{method} ({_count(seeds, 'seed')})", "", spoken
            )
        )
        means = {
            name: float(np.mean([row["metrics"][name] for row in own]))
            for name in told
            if all(name in row.get("metrics", {}) for row in own)
        }
        table.append([method, *(shown(means[name], unit) if name in means else "" for name in told), str(seeds)])
    if not figures:
        return []
    columns = ["learner", *(name.replace("_", " ") for name in told), "seeds"]
    return [Table(columns, table, "What was learnt, and what later learning did to it"), Figures(figures)]


_LEARNING = ("average", "forgetting", "backward_transfer", "forward_transfer", "plasticity")


def _erasure(rows: Sequence[Row]) -> list[Any]:
    """Audits of erasers: what each way of looking still finds, beside a model that never saw it."""
    tables = []
    for row in rows:
        if not row.get("measures"):
            continue
        subjects = list(dict.fromkeys(name for measure in row["measures"] for name in measure["values"]))
        table = [
            [
                measure["name"],
                measure["says"],
                *(_found(measure["values"].get(name, ""), measure["unit"]) for name in subjects),
            ]
            for measure in row["measures"]
        ]
        on = f" on {row['model']}" if row.get("model") else ""
        caption = f"{_method_name(row)}{on}, seed {row.get('seed')}: what is left of what was to be forgotten"
        tables.append(Table(["looked at by", "what it says", *subjects], table, caption, labels=2))
    return tables


def _found(value: Any, unit: str) -> str:
    """A measure's value, an interval where it has one."""
    metric = "accuracy" if unit == "share" else unit
    if isinstance(value, dict):
        return f"{shown(value['value'], metric)} ({shown(value['low'], metric)} to {shown(value['high'], metric)})"
    return "not enough" if value is None else value if isinstance(value, str) else shown(value, metric)


def _heads(rows: Sequence[Row]) -> list[Any]:
    """Maps of the heads: rows that hold a share for every head."""
    together: dict[tuple[str, str, tuple[int, ...]], list[Row]] = {}
    for row in rows:
        shares = row.get("metrics", {}).get("shares") if isinstance(row.get("metrics"), dict) else None
        if isinstance(shares, list) and np.ndim(shares) == 2:
            what = "retrieval score" if "recall" in row["metrics"] else "share of attention on the first token"
            together.setdefault((str(row.get("model")), what, np.shape(shares)), []).append(row)
    figures = []
    for place, ((model, what, shape), own) in enumerate(together.items()):
        asked = [row for row in own if row["metrics"].get("recall", 1) > 0] or own
        mean = np.mean([row["metrics"]["shares"] for row in asked], axis=0)
        spoken = f"Heat map of the {what} of {shape[0] * shape[1]} attention heads."
        figures.append(
            Figure(
                f"heads-{place}", head_map(mean, what), f"{what} on {model}", f"Mean of {len(asked)} prompts.", spoken
            )
        )
    return list(figures)


def _unsettled(rows: Sequence[Row]) -> list[Row]:
    """The latest failure of every cell that has no measurement."""
    done = {row.get("key") for row in rows}
    latest = {_cell_key(row): row for row in rows if "error" in row}
    return [row for key, row in latest.items() if key not in done]


def _cell_key(row: Row) -> str:
    return re.sub(r"-failed-\d+$", "", str(row.get("key", "")))


def _failed(rows: Sequence[Row]) -> list[Any]:
    failed = _unsettled(rows)
    if not failed:
        return []
    table = [
        [
            _method_name(row),
            str((row.get("budget") or {}).get("asked", "none")),
            str(row.get("seed")),
            row["error"]["type"],
            row["error"]["text"],
        ]
        for row in failed
    ]
    return [
        Table(["method", "budget", "seed", "error", "what it says"], table, "Cells without a measurement", labels=5)
    ]


def _records(rows: Sequence[Row], points: Points, names: Mapping[Point, str]) -> Records:
    """Every row, with the points that it is part of."""
    of: dict[str, list[str]] = {}
    for point in points.all:
        for key in point.keys:
            of.setdefault(key, []).append(names[point])
    columns = ["method", "task", "model", "budget", "seed", "value", "bytes", "ms per token", "seconds"]
    records = []
    for row in rows:
        metric, value = _headline(row)
        metrics = row["metrics"] if isinstance(row.get("metrics"), dict) else {}
        per_token = metrics.get("decode_seconds_per_token")
        task = row.get("cell", {}).get("task_label") or (row.get("task") or {}).get("name") or row.get("study", "")
        asked = (row.get("budget") or {}).get("asked") if isinstance(row.get("budget"), dict) else metrics.get("budget")
        texts: list[tuple[str, Any]] = [
            (_method_name(row), None),
            (str(task), None),
            (str(row.get("model") or ""), None),
            (str(asked or ""), None),
            ("" if row.get("seed") is None else str(row["seed"]), None),
            ("failed" if "error" in row else "" if value is None else shown(value, metric), value),
            ("" if row.get("kv_bytes") is None else size(row["kv_bytes"]), row.get("kv_bytes")),
            ("" if per_token is None else f"{1000 * per_token:.1f}", per_token),
            ("" if row.get("seconds") is None else f"{row['seconds']:.3g}", row.get("seconds")),
        ]
        cells = [(text, text if by is None and text else "" if by is None else by) for text, by in texts]
        told = {name: value for name, value in row.items() if name != "ledger"}
        record = Record(
            cells,
            of.get(str(row.get("key")), ()),
            str(row.get("command", "")),
            json.dumps(told, indent=2, ensure_ascii=False),
        )
        records.append(record)
    caption = "Titles sort, words filter, and a row opens to its command and to all that the ledger holds of it"
    return Records("records", columns, records, caption, labels=4)


def _headline(row: Row) -> tuple[str, float | None]:
    """The metric that a row is about, and its value."""
    metrics = row["metrics"] if isinstance(row.get("metrics"), dict) else {}
    if "scored" in row:
        return row["scored"]["metric"], metrics.get(row["scored"]["metric"])
    for name in _HEADLINES:
        if _is_number(metrics.get(name)):
            return name if name in ("perplexity", "loss") else "accuracy", float(metrics[name])
    return "", None


_HEADLINES = ("found", "average", "accuracy", "recall", "perplexity", "loss")  # of rows that are no comparison's


def _method_name(row: Row) -> str:
    if "cell" in row:
        return str(row["cell"]["label"])
    return str((row.get("method") or {}).get("name", row.get("study", "")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _files(rows: Sequence[Row]) -> str:
    files = list(dict.fromkeys(str(row["ledger"]) for row in rows))
    return files[0] if len(files) == 1 else f"{len(files)} ledgers"


def _empty(section: Section) -> bool:
    return all(isinstance(block, Figures) and not block.figures for block in section.blocks)
