"""Compare methods under budgets, on tasks, with models and seeds, at equal bytes or equal time.

The YAML file says what: models, tasks, methods, budgets, equal, seeds and more. Leaves a ledger in a folder; what it
holds already is not measured again. Given a ledger and --only KEY, one of its cells is measured anew and shown beside
what was recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vestige.evidence.compare import CompareResult, Rerun

RESUME = "the same command goes on where it stopped"


def run(
    spec: Annotated[Path, typer.Argument(help="The YAML file; or a ledger, with --only.")],
    out: Annotated[Path, typer.Option(help="Folder for the ledger.")] = Path("vestige-compare"),
    only: Annotated[str | None, typer.Option(help="Key of a ledger's row whose cell is to be measured again.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: cells side by side.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Of Ray; default: as many as there is room for.")] = None,
    gpus: Annotated[float, typer.Option(help="GPUs for each of Ray's workers.")] = 0,
    cpus: Annotated[float, typer.Option(help="CPUs for each of Ray's workers.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: RAY_ADDRESS, else this machine.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate the time, measure nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    from vestige.commands._shared import print_json
    from vestige.evidence.compare import compare, rerun

    if only is not None:
        again = rerun(spec, only)
        if as_json:
            print_json({"before": again.before, "now": again.now, "same": again.same})
        else:
            print(_both(again))
        if "error" in again.now:
            raise typer.Exit(1)
        return
    found = compare(
        spec,
        out=out,
        engine=engine,
        workers=workers,
        gpus=gpus,
        cpus=cpus,
        address=address,
        dry_run=dry_run,
        progress=not quiet,
    )
    if as_json:
        print_json(
            {**vars(found.estimate), "ledger": str(found.ledger.path), "measured": found.measured, "rows": found.rows}
        )
    elif not dry_run:
        print(_digest(found))
    if found.failed:
        raise typer.Exit(1)


def _digest(found: CompareResult) -> str:
    """What came of it on a few lines; the report has the rest."""
    from vestige.commands._shared import columns
    from vestige.evidence.points import points_of

    lines = []
    for (model, task, metric), points in points_of(found.rows).groups():
        table = [(metric, "budget", "value (95% interval)", "bytes per context", "ms per token")]
        table += [(p.method, p.budget, p.value_text, p.bytes_text, p.time_text) for p in points]
        lines += [f"{task} on {model}", columns(table), ""]
    for row in found.failed:
        lines.append(f"failed: {row['method']['name']}, seed {row['seed']}: {row['error']['text']}")
    ledger = found.ledger.path
    return "\n".join([*lines, f"ledger  {ledger}", f"page    vestige report {ledger}"])


def _both(again: Rerun) -> str:
    """A row as it was recorded, and as it came out now."""
    before, now = again.before, again.now
    if "error" in now:
        return f"it fails: {now['error']['type']}: {now['error']['text']}"
    lines = [f"{name:<8} {row.get('metrics', row.get('error'))}" for name, row in (("recorded", before), ("now", now))]
    same = "every example has the value that was recorded" if again.same else "the values differ from those recorded"
    return "\n".join([*lines, same])
