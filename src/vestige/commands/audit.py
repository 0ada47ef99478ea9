"""Audit a model: what it retrieves from its context, and how much of its cache it could give up.

Leaves report.html and ledger.jsonl in a folder. What the folder holds already is not measured again, so an
interrupted audit goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RESUME = "the same command goes on where it stopped"


def run(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a Hugging Face id, or a folder.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the report and the ledger.")] = Path("vestige-audit"),
    methods: Annotated[str | None, typer.Option(help="Cache policies, as in a2sf,h2o; or all.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Entries per head, as in 64,128; or shares, as in 0.25.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the prompts, as in 0,1,2.")] = None,
    depths: Annotated[str | None, typer.Option(help="Where the needle stands, 0 to 1, as in 0.1,0.5,0.9.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each context.")] = None,
    haystack: Annotated[str | None, typer.Option(help="Filler text; the default needs no file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter prompts.")] = False,
    batch: Annotated[int, typer.Option(help="Prompts that run together.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto: an accelerator if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as stored.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    from vestige.commands._shared import amount, listed, print_json, whole

    given = {
        "methods": listed("--methods", methods, str) if methods is not None else None,
        "budgets": listed("--budgets", budgets, amount) if budgets is not None else None,
        "seeds": listed("--seeds", seeds, whole) if seeds is not None else None,
        "depths": listed("--depths", depths, float) if depths is not None else None,
        "length": length,
        "haystack": haystack,
    }
    from vestige.evidence.audit import audit

    chosen = {key: value for key, value in given.items() if value is not None}
    found = audit(model, out=out, quick=quick, batch=batch, device=device, dtype=dtype, **chosen)  # type: ignore[arg-type]
    if as_json:
        print_json(found.summary())
    else:
        print(_digest(found.summary()))


def _digest(summary: dict[str, Any]) -> str:
    """The answers on a few lines; the report has the rest."""
    from vestige.commands._shared import columns

    anatomy, rows = summary["anatomy"], summary["retention"]
    budgets = sorted({row["budget"] for row in rows})
    table = [("needles found", *(str(budget) for budget in budgets), "enough from")]
    enough = {answer["policy"]: answer for answer in summary["smallest_budget"]}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        found = {row["budget"]: f"{row['found']:.0%}" for row in rows if row["policy"] == policy}
        budget = enough.get(policy, {}).get("budget")
        last = f"{budget} ({enough[policy]['bytes_share']:.0%} of the bytes)" if budget else "none of these"
        table.append((policy, *(found.get(budget, "") for budget in budgets), last if policy in enough else ""))
    return "\n".join(
        [
            f"{summary['model']}: {anatomy['layers']} layers, {anatomy['heads']} query and {anatomy['kv_heads']} "
            f"key-value heads, {anatomy['cache_bytes_per_token']:,} bytes of cache per token",
            f"{len(summary['retrieval_heads'])} retrieval heads; {summary['sink_share']:.0%} of all attention rests on "
            "the first token",
            "",
            f"Contexts of {summary['length']} tokens, cut to so many entries per head before the question was known:",
            columns(table),
            "",
            f"report  {summary['report']}\nledger  {summary['ledger']}",
        ]
    )
