"""Write the tables of cache policies into choosing.md and speed.md, from the results in benchmarks/context.

Run by hand where there are new results: ``python docs/scripts/context.py``. A test compares.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, put, rows_of, table, update

RESULTS = ROOT / "benchmarks" / "context"
PAGES = (ROOT / "docs" / "choosing.md", ROOT / "docs" / "speed.md")
POLICIES = (
    "full",
    "quantised-cache, 4 bits",
    "quantised-cache, 2 bits",
    "act",
    "duo-attention",
    "moa",
    "razor-attention",
    "tidal-decode",
    "longheads",
    "recycled-attention",
    "lazy-eviction",
    "streaming-llm",
    "h2o",
    "a2sf",
    "snapkv",
    "think(snapkv)",
    "pyramid(snapkv)",
    "adaptive(snapkv)",
    "adaptive(a2sf)",
    "tova",
    "knorm",
    "expected-attention",
)
WHOLE = POLICIES[:4]  # what holds and reads every entry
NEEDLES, SEVERAL, TEXTS = "needle", "multi-key needle", "perplexity"
LENGTHS, SHARES = (512, 1024, 2048, 4096), (0.5, 0.25, 0.1)
SHORT = LENGTHS[0]
WHY = {
    "where": (
        ("streaming-llm", "h2o", "a2sf", "snapkv", "expected-attention", "tova", "knorm", "pyramid", "adaptive",
         "duo-attention", "moa", "razor-attention", "think(snapkv)"),
        ("answer_held", "answer_held_where_looked_for"),
        ("answer's tokens held", "held where looked for", "held", "held where looked for"),
    ),
    "read": (
        ("recycled-attention", "tidal-decode", "longheads", "quantised-cache, 4 bits", "quantised-cache, 2 bits",
         "think(full)", "act"),
        ("answer_read", "answer_read_where_looked_for"),
        ("answer read", "read where looked for", "read", "read where looked for"),
    ),
}  # fmt: skip
PRESSES = {
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "expected-attention": "ExpectedAttentionPress",
    "streaming-llm": "StreamingLLMPress",
    "adaptive": "AdaKVPress",
    "pyramid": "PyramidKVPress",
    "h2o": "ObservedAttentionPress",
}


def percent(value: float) -> str:
    return f"{value:.0%}"


def quality() -> Callable[[str, str, int, float], str]:
    """What a policy came to on a task, at a length, with a share of the entries; "-" where it was not measured."""
    cells: dict[Any, list[float]] = defaultdict(list)
    for row in rows_of(RESULTS / "quality.jsonl"):
        told, length = row["metrics"], row["task"]["length"]
        cells[row["task"]["name"], told["policy"], length, told["budget"]].append(told["score"])

    def cell(task: str, policy: str, length: int, share: float) -> str:
        found = cells.get((task, policy, length, length if policy in WHOLE else int(share * length)))
        if not found:
            return "-"
        return f"{mean(found):.1f}" if task == TEXTS else percent(mean(found))

    return cell


def by_length() -> list[str]:
    """Every policy at half of the entries."""
    cell, names = quality(), [f"{length:,}" for length in LENGTHS]
    heads = ["policy", f"needles: {names[0]}", *names[1:], f"perplexity: {names[0]}", *names[1:]]
    lines = [
        [policy, *(cell(task, policy, length, 0.5) for task in (NEEDLES, TEXTS) for length in LENGTHS)]
        for policy in POLICIES
    ]
    return table(heads, lines)


def with_less() -> list[str]:
    """Needles that those find which keep or read fewer."""
    cell, names = quality(), [f"{length:,}" for length in LENGTHS]
    heads = ["policy", f"a quarter: {names[0]}", *names[1:], f"a tenth: {names[0]}", *names[1:]]
    lines = [
        [policy, *(cell(NEEDLES, policy, length, share) for share in SHARES[1:] for length in LENGTHS)]
        for policy in POLICIES
        if policy not in WHOLE
    ]
    return table(heads, lines)


def by_budget() -> list[str]:
    """All three tasks in the shortest texts."""
    cell, names = quality(), [percent(share) for share in SHARES]
    titles = ("needles", "several", "perplexity")
    heads = [f"{title}: {name}" if name == names[0] else name for title in titles for name in names]
    lines = [
        ["full, all kept", *(c for task in (NEEDLES, SEVERAL, TEXTS) for c in (cell(task, "full", SHORT, 1), "", ""))]
    ]
    for policy in POLICIES:
        if policy not in WHOLE:
            found = [cell(task, policy, SHORT, share) for task in (NEEDLES, SEVERAL, TEXTS) for share in SHARES]
            lines.append([policy, *found])
    return table(["policy", *heads], lines)


def why(which: str) -> list[str]:
    """What is held, or read, of the answer, in both kinds of filler."""
    found = json.loads((RESULTS / "why.json").read_text(encoding="utf-8"))
    policies, entries, says = WHY[which]
    heads = ["policy", "all different: found", *says[:2], "repeated: found", *says[2:]]
    lines = []
    for policy in policies:
        cells = [policy]
        for filler in ("all different", "repeated"):
            row = found[filler][policy]
            cells += [percent(row["found"]), *(percent(row.get(entry, 1.0)) for entry in entries)]
        lines.append(cells)
    return table(heads, lines)


def past() -> list[str]:
    """Reading on past the trained length: texts that all policies have read."""
    seen: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows_of(RESULTS / "beyond.json"):
        if row["task"] == "perplexity":
            seen[row["length"]][row["policy"]][row["seed"]] = row["seen"]
    policies = list(next(iter(seen.values())))
    lines = []
    for length, found in sorted(seen.items()):
        seeds = set.intersection(*(set(found[policy]) for policy in policies))
        if seeds:
            means = [mean(found[policy][seed] for seed in seeds) for policy in policies]
            lines.append([f"{length:,}", str(len(seeds)), *(f"{m:,.0f}" if m >= 1000 else f"{m:.1f}" for m in means)])
    return table(["tokens", "texts", *policies], lines)


def told() -> list[str]:
    """In how many texts the pass key is told."""
    seen: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(RESULTS / "beyond-keys.json"):
        if row["task"] == "pass key":
            seen[row["length"]][row["policy"]].append(row["seen"])
    policies = list(next(iter(seen.values())))
    lines = [
        [f"{length:,}", *(f"{sum(found[policy])} of {len(found[policy])}" for policy in policies)]
        for length, found in sorted(seen.items())
    ]
    return table(["tokens", *policies], lines)


def decoding() -> list[str]:
    """A step beside its floor and the peer."""
    lines = []
    for row in sorted(rows_of(RESULTS / "decode.json"), key=_step):
        cells = [_said(row["what"]), str(row["batch"]), f"{row['held']:,}", f"{row['ms']:.1f}"]
        over = f"{row['over_floor']:.2f}" if row["over_floor"] < 9.5 else f"{row['over_floor']:.1f}"
        lines.append([*cells, over, f"{row['tokens_per_second']:,.0f}"])
    return table(["", "batch", "entries a head", "ms a token", "over the floor", "tokens/s"], lines)


def _said(what: str) -> str:
    plain = what.removeprefix("plain loop, ")
    name, _, how = plain.partition(", ")
    budget = f"{name}, budget 2,048" if name in ("a2sf", "streaming-llm") else name
    more = {"compiled": ", `compile=True`", "graph": ", `graph=True`", "": ""}[how]
    return budget + more + (", plain loop" if plain != what else "")


def _step(row: dict[str, Any]) -> Any:
    name = row["what"].removeprefix("plain loop, ").partition(",")[0]
    order = ("a2sf", "streaming-llm", "full", "compiled static cache").index(name)
    return order, row["batch"] > 1, row["batch"], row["held"], -row["ms"]


def kvpress() -> list[str]:
    """Reading a prompt and decoding after it, both sides."""
    found = {(row["side"], row["prompt"], row["policy"]): row for row in rows_of(RESULTS / "compression.json")}
    sides = ("vestige", "kvpress")
    lines = []
    for prompt in sorted({prompt for side, prompt, _ in found if side == "kvpress"}):
        for policy in ("snapkv", "tova", "h2o", "a2sf"):
            rows = [found.get((side, prompt, policy), {}) for side in sides]
            cells = []
            for side, row in zip(sides, rows, strict=True):
                if "prefill_s" not in row:
                    cells.append((row.get("error", "-"), "-", "-"))
                    continue
                spent = row["prefill_s"] - found[side, prompt, "none"]["prefill_s"]
                cells.append((f"{spent:.3f}", f"{row['decode_s']:.2f}", f"{row['peak_gib']:.2f}"))
            name = "h2o, observed attention" if policy == "h2o" else policy
            lines.append([name, f"{prompt:,}", *(", ".join(pair) for pair in zip(*cells, strict=True))])
    return table(["policy", "prompt", "compression, s: Vestige, kvpress", "128 tokens, s", "peak, GiB"], lines)


def _both(rows: Iterable[dict[str, Any]]) -> dict[Any, dict[str, float]]:
    """Scores by what was asked, of what both sides have answered."""
    found: dict[Any, dict[str, float]] = defaultdict(dict)
    for row in rows:
        what = tuple(row[name] for name in ("task", "policy", "length", "seed", "prompt", "budget"))
        found[what][row["side"]] = row["score"]
    return {what: sides for what, sides in found.items() if len(sides) == 2}


def presses() -> list[str]:
    """What comes out after the cut, both sides."""
    found = _both(rows_of(RESULTS / "peers.json"))
    lines = []
    for policy, press in PRESSES.items():
        of = {
            task: [sides for what, sides in found.items() if what[:2] == (task, policy)]
            for task in ("needle", "needle, question seen", "perplexity")
        }
        cells = [", ".join(form(mean(s[side] for s in seen)) for side in ("vestige", "kvpress"))
                 for seen, form in zip(of.values(), (_hundred, _hundred, "{:.2f}".format), strict=True)]  # fmt: skip
        counts = [len(seen) for seen in of.values()]
        lines.append([f"{policy}, {press}", f"{counts[0]} and {counts[1]}", *cells[:2], str(counts[2]), cells[2]])
    heads = ["policy, press", "answers", "needles: Vestige, kvpress", "question seen", "texts", "perplexity"]
    return table(heads, lines)


def _hundred(share: float) -> str:
    return f"{100 * share:.0f}"


def scores() -> list[str]:
    """What scores cost, everything kept."""
    found = {
        (row["prompt"], row["policy"]): row for row in rows_of(RESULTS / "compression.json") if row["side"] == "scores"
    }
    lines = []
    for prompt in sorted({prompt for prompt, _ in found}):
        plain, scored = found[prompt, "full"], found[prompt, "a2sf, all kept"]
        more = 1024 * (scored["peak_gib"] - plain["peak_gib"])
        lines.append([f"{prompt:,}", f"{scored['prefill_s'] / plain['prefill_s']:.2f}", f"{more:.0f}"])
    return table(["prompt", "a2sf beside `full`: time", "memory, MiB"], lines)


def on_cpu() -> list[str]:
    """A step beside one of the model alone, those first that add least."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows_of(RESULTS / "overhead.json"):
        found[row["policy"]][row["context"]] = row["ratio"]
    contexts = sorted({context for ratios in found.values() for context in ratios})
    order = sorted(found.items(), key=lambda pair: pair[1][contexts[0]])
    lines = [[policy, *(f"{ratios[context]:.2f}" for context in contexts)] for policy, ratios in order]
    return table(["policy", *(f"at {context:,} tokens" for context in contexts)], lines)


TABLES: dict[str, Callable[[], list[str]]] = {
    "lengths": by_length,
    "less": with_less,
    "budgets": by_budget,
    "where": lambda: why("where"),
    "read": lambda: why("read"),
    "past": past,
    "told": told,
    "decoding": decoding,
    "kvpress": kvpress,
    "presses": presses,
    "scores": scores,
    "cpu": on_cpu,
}


def written(page: str) -> str:
    """The page with the tables of now."""
    for name, lines_of in TABLES.items():
        page = put(page, name, lines_of())
    return page


if __name__ == "__main__":
    update(PAGES, written)
