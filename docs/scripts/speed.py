"""Write the tables of speed into layers.md, from the results in benchmarks/layers.

Run by hand where there are new results: ``python docs/scripts/speed.py``. A test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, Rows, put, rows_of, table, update

RESULTS, PAGES = ROOT / "benchmarks" / "layers", (ROOT / "docs" / "layers.md",)
PATHS = ("ours", "fla", "kernels", "own")  # in the order in which a layer would take them
TITANS = ("vestige", "titans-pytorch, gates per token", "titans-pytorch, gates per block")
WORDS = {"fla": "fla", "kernels": "kernels of ours", "own": "portable"}


def parts_of(name: str) -> list[Rows]:
    """The rows of each part of a result; none where it was not run."""
    return [rows_of(place) for place in sorted(RESULTS.glob(f"{name}*.json"))]


def every(name: str) -> Rows:
    """The rows of all parts."""
    return [row for rows in parts_of(name) for row in rows]


def digits(value: float | None, suffix: str = "") -> str:
    """A number as people read it."""
    if value is None:
        return "-"
    return f"{value:,.0f}{suffix}" if value >= 100 else f"{value:.3g}{suffix}"


def pair(row: dict[str, Any] | None) -> str:
    """Milliseconds forward, and forward with backward."""
    if row is None:
        return ""
    if "error" in row:
        return row["error"].split(":")[0]
    both = row.get("both_error", digits(row["both_ms"])).split(":")[0]
    return f"{digits(row['forward_ms'])} / {both}"


def against_attention() -> list[str]:
    """One row per mixer: what a layer runs at every length; and at the shortest, by what it can be computed."""
    rows = every("speed-h100")
    lengths = sorted({row["length"] for row in rows})
    found = {(row["mixer"], row["what"], row["path"], row["length"]): row for row in rows}
    cases = dict.fromkeys((row["what"], row["mixer"]) for row in rows)

    def taken(what: str, mixer: str, length: int) -> dict[str, Any] | None:
        """What a layer runs: the row that says so, or that of the path which it would take in training."""
        rows = [row for path in PATHS[:-1] if (row := found.get((mixer, what, path, length)))]
        return next((row for row in rows if row.get("both_ms") or "both_error" in row), rows[0] if rows else None)

    def cost(case: tuple[str, str]) -> tuple[bool, float]:
        row = taken(*case, lengths[0]) or found.get((case[1], case[0], "own", lengths[0]), {})
        return case[0] != "op", row.get("both_ms") or 1000 * row.get("forward_ms", 1.0)

    names = [f"{length // 1024}k" for length in lengths]
    by = [f"{WORDS[path]}, {names[0]}" for path in PATHS[1:]]
    lines = []
    for what, mixer in sorted(cases, key=cost):
        cells = [pair(taken(what, mixer, length)) for length in lengths]
        cells += [pair(found.get((mixer, what, path, lengths[0]))) for path in PATHS[1:]]
        lines.append([f"`{mixer}`", "operator" if what == "op" else "layer", *cells])
    return table(["mixer", "what", *names, *by], lines)


def beside_fla() -> list[str]:
    """One row per mixer: the time through a layer's operator over that of flash-linear-attention alone, of one run."""
    found: dict[str, dict[int, str]] = {}
    for rows in parts_of("speed-h100"):
        ours = {(row["mixer"], row["length"]): row for row in rows if row["path"] == "ours"}
        for row in rows:
            if row["path"] == "fla" and (mine := ours.get((row["mixer"], row["length"]))):
                ratios = [f"{mine[kind] / row[kind]:.2f}" if row[kind] else "-" for kind in ("forward_ms", "both_ms")]
                found.setdefault(row["mixer"], {})[row["length"]] = " / ".join(ratios)
    lengths = sorted({length for cells in found.values() for length in cells})
    lines = [[f"`{mixer}`", *(cells.get(length, "") for length in lengths)] for mixer, cells in sorted(found.items())]
    return table(["mixer", *(f"{length // 1024}k" for length in lengths)], lines)


def against_steps() -> list[str]:
    """One row per recurrent mixer: how many times the time of a text goes into its tokens one after the other."""
    lines = []
    rows = sorted(every("speed-cpu"), key=lambda row: -row.get("steps_over_chunks_both", 0))
    for row in rows:
        ratios = [row.get(f"steps_over_chunks_{kind}") for kind in ("forward", "both")]
        lines.append([f"`{row['mixer']}`", *(digits(ratio, " x") for ratio in ratios)])
    return table(["mixer", "forward", "forward and backward"], lines)


def decoding() -> list[str]:
    """One row per mixer: a step's kernels and the whole of it, at the shortest and longest context, of one row of
    tokens and of several, and bytes held."""
    rows = [row for row in every("decoding-h100") if row["what"] == "layer" and row["context"]]
    if not rows:
        return []
    ends = (min(row["context"] for row in rows), max(row["context"] for row in rows))
    several, single = max(row["batch"] for row in rows), [row for row in rows if row["batch"] == 1]
    names = [f"{end // 1024}k" for end in ends]
    found = {(row["mixer"], row["batch"], row["context"]): row for row in rows}
    heads = [f"kernels at {name}, ms" for name in names] + [f"step at {names[1]}, ms"]
    heads += [f"{several} rows: kernels at {name}, ms" for name in names if several > 1]
    lines = []
    most = {row["mixer"]: row["state_bytes"] for row in sorted(single, key=lambda row: row["state_bytes"])}
    for mixer in sorted(most, key=lambda mixer: most[mixer]):
        first, last = (found.get((mixer, 1, end), {}) for end in ends)
        cells = [digits(row.get("graph_ms")) for row in (first, last)] + [digits(last.get("eager_ms"))]
        cells += [digits(found.get((mixer, several, end), {}).get("graph_ms")) for end in ends if several > 1]
        cells += [f"{row['state_bytes']:,}" if row else "-" for row in (first, last)]
        lines.append([f"`{mixer}`", *cells])
    return table(["mixer", *heads, *(f"bytes at {name}" for name in names)], lines)


def against_titans() -> list[str]:
    """Titans' memory here and in titans-pytorch: milliseconds, and gigabytes at the peak."""
    found: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}
    for row in every("titans-h100"):
        found.setdefault((row["dim"], row["length"], row["dtype"]), {})[row["memory"]] = row

    def cell(row: dict[str, Any] | None) -> str:
        peak = f", {row['peak_bytes'] / 1e9:.1f} GB" if row and "peak_bytes" in row else ""
        return pair(row) + peak

    lines = []
    for (dim, length, dtype), memories in found.items():
        cells = [cell(memories.get(name)) for name in TITANS]
        if all(cells):
            lines.append([str(dim), f"{length:,}", dtype, *cells])
    here = ["here", "titans-pytorch, gates per token", "gates per block of 64"]
    return table(["16 heads of", "tokens", "type", *here], lines)


TABLES = {
    "speed": (against_attention, "speed-h100"),
    "fla": (beside_fla, "speed-h100"),
    "steps": (against_steps, "speed-cpu"),
    "decoding": (decoding, "decoding-h100"),
    "titans": (against_titans, "titans-h100"),
}
"""How each table is made, and the results that it needs."""


def written(page: str) -> str:
    """The page with the tables of now."""
    for name, (lines_of, needed) in TABLES.items():
        if every(needed):
            page = put(page, name, lines_of())
    return page


if __name__ == "__main__":
    update(PAGES, written)
