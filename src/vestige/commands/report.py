"""Make one page of ledgers: quality against bytes and seconds, forgetting, erasure, heads, every row.

A folder stands for its ledger.jsonl. --markdown writes a summary for a pull request as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    ledgers: Annotated[list[Path], typer.Argument(help="Ledgers, or folders that hold one.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("vestige-report.html"),
    markdown: Annotated[Path | None, typer.Option(help="A file for a summary in Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was read as JSON.")] = False,
) -> None:
    import sys

    from vestige.commands._shared import print_json
    from vestige.evidence.report.ledger_page import report

    read = report(ledgers, out, markdown)
    for note in read.notes:
        print(f"vestige: {note}", file=sys.stderr)
    if as_json:
        told = {"rows": len(read.rows), "broken": read.broken, "repeated": read.repeated, "report": str(out)}
        print_json({**told, "markdown": None if markdown is None else str(markdown)})
    else:
        print("\n".join([f"report    {out}", *([] if markdown is None else [f"markdown  {markdown}"])]))
