"""Write the tables of learners and erasers into weights.md and weights-results.md, from benchmarks/weights.

Run by hand where there are new results: ``python docs/scripts/weights.py``. A test compares.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, Rows, put, rows_of, table, update

RESULTS = ROOT / "benchmarks" / "weights"
PAGES = [ROOT / "docs" / name for name in ("weights.md", "weights-results.md")]
STREAMS = {"digits": "Split digits", "fashion-mnist": "Split Fashion-MNIST"}
LANGUAGE = {
    "domains": ("Texts of one kind after the other", "perplexity at the end", lambda score: f"{math.exp(-score):.1f}"),
    "domains-small": (
        "Fewer such texts, a small model of bytes",
        "perplexity of a byte at the end",
        lambda score: f"{math.exp(-score):.1f}",
    ),
    "facts": (
        "Facts, property by property",
        "likelihood of a token at the end",
        lambda score: f"{math.exp(score):.2f}",
    ),
    "facts-small": (
        "The same of fewer, a small model of bytes",
        "likelihood of a byte at the end",
        lambda score: f"{math.exp(score):.2f}",
    ),
}
DATA = {"digits": "digits", "fashion-mnist": "Fashion-MNIST", "facts": "SmolLM2", "facts-small": "a model of bytes"}
TASKS = {"class": "one class", "random": "a hundred rows at random"}
ELEMENTS = {"facts": "twelve chemical elements", "facts-small": "four chemical elements"}
OVERHEAD = {"overhead": "CPU", "overhead-cuda": "GPU", "overhead-cuda-base": "GPU, ViT-base"}
THINGS = {"digits": "digits", "fashion-mnist": "clothes"}
SHORT = {"class": "a class", "random": "100 rows"}
ENDS = {
    "digits": ("digits", lambda score: f"{score:.0%}"),
    "fashion-mnist": ("clothes", lambda score: f"{score:.0%}"),
    "domains": ("texts, perplexity", lambda score: f"{math.exp(-score):.1f}"),
    "facts": ("facts, likelihood", lambda score: f"{math.exp(score):.2f}"),
}
LANGUAGE_ALONE = (
    "head=softmax",
    "fisher_rows=64",
    "tokens=16",
)  # of a learner's settings, those that language asks for
SSD = {"an H100": "ssd-cuda", "a CPU": "ssd-cpu"}
NEAR = 0.1  # of the model trained again: as the certificate of erasers asks for


def result(*name: str) -> Rows:
    """The rows of a result; none where it was not run."""
    return rows_of(RESULTS / f"{'-'.join(name)}.json")


def spread(values: list[float], form: str = ".2f") -> str:
    """The mean, with the least and the most."""
    least, most = min(values), max(values)
    between = f" ({least:{form}}{' to ' if least < 0 else '-'}{most:{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{between}"


def held(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.0f} GB"


def learners(stream: str) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The rows of each learner, those first that know most at the end, and a line on those that were left out."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    left_out = {}
    for row in result("retain", stream):
        if "left_out" in row:
            left_out[row["learner"]] = row["left_out"]
        else:
            found[row["learner"]].append(row)
    order = sorted(found.items(), key=lambda pair: -mean(r["average"] for r in pair[1]))
    why = "; ".join(f"`{name}` ({reason})" for name, reason in left_out.items())
    return dict(order), ["", f"Not on this stream: {why}."] if left_out else []


def against(name: str, rows: list[dict[str, Any]], plain: dict[int, float]) -> str:
    """On how many seeds more is known at the end than after fine-tuning."""
    better = sum(row["average"] > plain[row["seed"]] for row in rows if row["seed"] in plain)
    return "" if name in ("finetune", "joint") else f"above fine-tuning: {better} of {len(rows)} seeds"


def kept(rows: list[dict[str, Any]]) -> str:
    """The bytes that a learner held."""
    return held(mean(row["replay_bytes"] + row["state_bytes"] for row in rows))


def retain_table(stream: str) -> list[str]:
    """One row per learner of pictures."""
    found, notes = learners(stream)
    plain = {row["seed"]: row["average"] for row in found["finetune"]}
    heads = ["learner", "at the end", "forgetting", "just after learning", "what was known before", "held", "verdict"]
    lines = []
    for name, rows in found.items():
        cells = [
            f"`{name}`",
            spread([row["average"] for row in rows]),
            spread([row["forgetting"] for row in rows]),
            f"{mean(row['plasticity'] for row in rows):.2f}",
            f"{mean(row['general_kept'] for row in rows):+.2f}",
            kept(rows),
            against(name, rows, plain),
        ]
        lines.append(cells)
    return [f"**{STREAMS[stream]}**", "", *table(heads, lines), *notes]


def language_table(stream: str) -> list[str]:
    """One row per learner of a language model; the model before, first."""
    found, notes = learners(stream)
    title, unit, said = LANGUAGE[stream]
    first = found["finetune"]
    plain = {row["seed"]: row["average"] for row in first}
    names = first[0]["names"]
    heads = ["learner", *names, "all, in nats", "forgotten, in nats", "a novel", "held", "verdict"]

    def line(name: str, scores: list[list[float]], general: list[float], cells: list[str]) -> list[str]:
        each = [said(mean(column)) for column in zip(*scores, strict=True)]
        novel = f"{math.exp(-mean(general)):.1f}"
        return [name, *each, *cells[:2], novel, *cells[2:]]

    before = [row["untrained"] for row in first]
    alone = [spread([mean(scores) for scores in before]), "", "", ""]
    lines = [line("*before*", before, [row["general"][0] for row in first], alone)]
    for name, rows in found.items():
        cells = [spread([row["average"] for row in rows]), spread([row["forgetting"] for row in rows])]
        cells += [kept(rows), against(name, rows, plain)]
        lines.append(
            line(f"`{name}`", [row["matrix"][-1] for row in rows], [row["general"][-1] for row in rows], cells)
        )
    seeds = len({row["seed"] for row in first})
    about = f"**{title}** ({unit}; of the novel always perplexity; {seeds} seed{'s' if seeds > 1 else ''})"
    return [about, "", *table(heads, lines), *notes]


def overhead_table() -> list[str]:
    """What learners add to a step, where it was measured; those first that add least on a CPU."""
    found = {name: {row["learner"]: row for row in result(name) if "overhead" in row} for name in OVERHEAD}
    places = [name for name, rows in found.items() if rows]
    if not places:
        return []
    names = sorted(found[places[0]], key=lambda learner: found[places[0]][learner]["overhead"])
    lines = []
    for name in names:
        rows = [found[place].get(name) for place in places]
        cells = ["" if row is None else f"{row['overhead']:+.0%}" for row in rows]
        lines.append([f"`{name}`", f"{found[places[0]][name]['forward_passes']:.2g}", *cells])
    return table(["learner", "forward passes", *(f"a step, {OVERHEAD[place]}" for place in places)], lines)


def erase_table(data: str, task: str) -> list[str]:
    """One row per eraser, those first that are nearest to training again; then that, and the model before."""
    by_eraser = erased(data, task)
    if not by_eraser:
        return []
    shown = SHOWN["facts" if data in ELEMENTS else "pictures"]
    some = max(by_eraser.values(), key=len)
    lines = [
        _erased(f"`{name}`", measures, "erased", shown, verdict(measures))
        for name, measures in sorted(by_eraser.items(), key=lambda pair: gap(pair[1], shown))
    ]
    lines += [_erased(f"*{name}*", some, name, shown, "") for name in ("retrained", "before")]
    rows = table(["eraser", *shown.values(), "steps to relearn", "verdict"], lines)
    return [f"**To forget: {ELEMENTS.get(data) or TASKS[task]}** ({DATA[data]})", "", *rows]


# What a table shows, by its name in an audit, and what its column is called.
SHOWN = {
    "pictures": {
        "forget accuracy": "to forget",
        "retain accuracy": "to keep",
        "unseen others accuracy": "never seen",
        "unseen accuracy": "unseen, alike",
        "membership by loss": "membership",
    },
    "facts": {
        "forget accuracy": "to forget",
        "paraphrases accuracy": "in other words",
        "retain accuracy": "to keep",
        "unseen accuracy": "never seen",
        "membership by loss": "membership",
    },
}
KEPT = ("retain accuracy", "unseen others accuracy")


def _erased(name: str, measures: list[dict[str, Any]], which: str, shown: dict[str, str], says: str) -> list[str]:
    cells = [spread([m[each][which] for m in measures]) for each in shown]
    steps = [m["steps to relearn"][which] for m in measures]
    cells.append(", ".join("none" if step is None else f"{step:.0f}" for step in steps))
    return [name, *cells, says]


def gap(measures: list[dict[str, Any]], shown: dict[str, str]) -> float:
    """The mean distance from the model trained again, over what the table shows."""
    return mean(abs(m[each]["erased"] - m[each]["retrained"]) for m in measures for each in shown)


def verdict(measures: list[dict[str, Any]]) -> str:
    """In words, whether on every seed it is within a tenth of the model trained again."""

    found = [f"{what} ({sum(seeds)} of {len(seeds)})" for what, seeds in wanting(measures).items() if any(seeds)]
    return "; ".join(found) or "as trained again"


def wanting(measures: list[dict[str, Any]]) -> dict[str, list[bool]]:
    """In which ways it is further than a tenth from the model trained again, and on which seeds."""

    def above(m: dict[str, Any], name: str, sign: int) -> bool:
        return name in m and sign * (m[name]["erased"] - m[name]["retrained"]) > NEAR

    return {
        "still known": [above(m, "forget accuracy", 1) for m in measures],
        "still known in other words": [above(m, "paraphrases accuracy", 1) for m in measures],
        "forgotten more than by training again": [above(m, "forget accuracy", -1) for m in measures],
        "others lost": [any(above(m, name, -1) for name in KEPT) for m in measures],
    }


def erasers_table() -> list[str]:
    """One row per eraser: on how many seeds it is near the model trained again, of each thing to forget."""
    tasks = {f"{what}, {thing}": (data, task) for data, thing in THINGS.items() for task, what in SHORT.items()}
    tasks |= {"twelve elements": ("facts", "elements")}
    near: dict[str, dict[str, int]] = defaultdict(dict)
    for column, (data, task) in tasks.items():
        for name, measures in erased(data, task).items():
            near[name][column] = sum(not any(seed) for seed in zip(*wanting(measures).values(), strict=True))
    order = sorted(near, key=lambda name: -sum(near[name].values()))
    lines = [[f"`{name}`", *(str(near[name].get(column, "")) for column in tasks)] for name in order]
    return table(["eraser", *tasks], lines)


def learners_table() -> list[str]:
    """One row per learner: what is known at the end of each stream, and on how many it is above fine-tuning."""
    ends: dict[str, list[str]] = defaultdict(lambda: [""] * len(ENDS))
    above: dict[str, list[bool]] = defaultdict(list)
    for place, (stream, (_, said)) in enumerate(ENDS.items()):
        found = learners(stream)[0]
        plain = {row["seed"]: row["average"] for row in found["finetune"]}
        for long, rows in found.items():
            name = " ".join(word for word in long.split() if word not in LANGUAGE_ALONE)
            ends[name][place] = said(mean(row["average"] for row in rows))
            above[name].append(all(row["average"] > plain[row["seed"]] for row in rows))
    most = [name for name in ends if "=" not in name or len(above[name]) >= len(ENDS) - 1]
    order = sorted(most, key=lambda name: (name != "joint", -sum(above[name]), name))
    lines = []
    for name in order:
        beside = "" if name in ("finetune", "joint") else f"{sum(above[name])} of {len(above[name])}"
        lines.append([f"`{name}`", *ends[name], beside])
    return table(["learner", *(head for head, _ in ENDS.values()), "above"], lines)


def erased(data: str, task: str) -> dict[str, list[dict[str, Any]]]:
    """What was measured after each eraser, by seed."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result("erase", data):
        if row["task"] == task and "left_out" not in row:
            found[row["eraser"]].append(row["measures"])
    return found


def ssd_table() -> list[str]:
    """Whole erasures by ssd and by its authors' loop, with the information of single rows."""
    lines = []
    for device, name in SSD.items():
        rows = [r for r in result(name) if r["what"] == "seconds" and r["estimator"] == "per-example"]
        for row in sorted(rows, key=lambda row: row["tokens"]):
            own, theirs = (row["ms_per_image"][side] for side in ("vestige", "authors"))
            times = f"{row['authors_over_vestige']:.1f} times"
            lines.append([device, str(row["tokens"]), f"{row['images']:,}", f"{own:.0f} ms", f"{theirs:.0f} ms", times])
    return table(["on", "tokens", "images", "`ssd`, an image", "the authors' loop", ""], lines)


def ssd_memory() -> list[str]:
    """The most that is held while erasing, in copies of the weights: batches of one, then of many."""
    found: dict[tuple[str, str], dict[tuple[str, int], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for device, name in SSD.items():
        for row in result(name):
            if row["what"] == "memory":
                side = (row["side"], row["estimator"])
                found[side][device, row["tokens"]][row["batch"]] = row["copies"]
    columns = sorted({column for cells in found.values() for column in cells})
    lines = []
    for (who, estimator), cells in found.items():
        what = f'`estimator="{estimator}"`' if who == "vestige" else "the authors' loop"
        each = (cells.get(column, {}) for column in columns)
        lines.append([what, *(", ".join(f"{copies:.1f}" for _, copies in sorted(c.items())) for c in each)])
    return table(["", *(f"{device}, {tokens} tokens" for device, tokens in columns)], lines)


def tables() -> dict[str, list[str]]:
    """What stands between the marks of the pages."""
    found = {
        "retain": [retain_table(stream) for stream in STREAMS if result("retain", stream)],
        "language": [language_table(stream) for stream in LANGUAGE if result("retain", stream)],
        "erase": [erase_table(data, task) for data in STREAMS if result("erase", data) for task in TASKS],
        "facts": [erase_table(data, "elements") for data in ELEMENTS],
        "overhead": [overhead_table()],
        "ssd": [ssd_table()],
        "ssd memory": [ssd_memory()],
        "erasers": [erasers_table()],
        "learners": [learners_table()],
    }
    kept = {name: [part for part in parts if part] for name, parts in found.items()}
    return {name: _joined(parts) for name, parts in kept.items() if parts}


def _joined(parts: list[list[str]]) -> list[str]:
    return [line for number, part in enumerate(parts) for line in ([""] if number else []) + part]


def written(page: str) -> str:
    """The page with the tables of now."""
    for name, lines in tables().items():
        page = put(page, name, lines)
    return page


if __name__ == "__main__":
    update(PAGES, written)
