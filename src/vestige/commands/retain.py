"""Let learners go through a stream that a YAML file describes, and see what each keeps.

The file says: out, data, experiences, model, learners, train and more. Leaves report.html, ledger.jsonl and checkpoints
in the folder that it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RESUME = "the same command goes on from the last checkpoint"


def run(
    spec: Annotated[Path, typer.Argument(help="The YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing meanwhile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    import sys

    from vestige.commands._shared import columns, print_json
    from vestige.evidence.runs.retain import run_retention

    done = run_retention(
        spec,
        tell=(lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True)),
        out=None if out is None else str(out.resolve()),
        seed=seed,
    )
    if as_json:
        print_json({label: run.row() for label, run in done.runs.items()})
        return
    names = ("average", "forgetting", "plasticity")
    rows: list[tuple[str, ...]] = [("learner", *names, "seconds")]
    rows += [
        (label, *(f"{run.metrics()[name]:.3f}" for name in names), f"{sum(run.seconds):.1f}")
        for label, run in done.runs.items()
    ]
    print(f"{columns(rows)}\n\nreport  {done.folder / 'report.html'}\nledger  {done.folder / 'ledger.jsonl'}")
