"""Make a model forget what a YAML file names, and look at what is left.

The file says: out, data, forget, model, learn, reference, eraser and more. Leaves the model, report.html, audit.json
and ledger.jsonl in the folder that it names. Models that were taught for it are kept and taken up again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RESUME = "the same command takes up the models that were taught"


def run(
    spec: Annotated[Path, typer.Argument(help="The YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder, instead of the file's.")] = None,
    eraser: Annotated[str | None, typer.Option(help="An eraser's name, instead of the file's eraser.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the erasure and the audit.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Teach anew where the folder holds models.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing meanwhile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON.")] = False,
) -> None:
    import sys

    from vestige.commands._shared import print_json
    from vestige.evidence.runs.erase import run_erasure

    done = run_erasure(
        spec,
        fresh=fresh,
        tell=(lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True)),
        out=None if out is None else str(out.resolve()),
        eraser=None if eraser is None else {"name": eraser},
        seed=seed,
    )
    if as_json:
        print_json(done.audit.to_dict())
    else:
        print(f"{done.audit}\n\nmodel   {done.folder / 'erased'}\nreport  {done.folder / 'report.html'}")
