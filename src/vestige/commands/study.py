"""Repeat a paper's finding at a small scale: what it claims, what was seen, and the verdict.

Leaves report.html and ledger.jsonl in a folder. Seeds that the folder holds already are not measured again, so an
interrupted study goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vestige.evidence.studies.study import StudyResult

RESUME = "the same command goes on at the seed that it was in"


def run(
    name: Annotated[str, typer.Argument(help="The study, as in attention-sinks.")],
    scale: Annotated[str, typer.Option(help="small: minutes; full: nearer to the paper.")] = "small",
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1,2.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Folder for report and ledger; default: vestige-NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Model, for studies that look at one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto: an accelerator if there is one.")] = "cpu",
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting, as in steps=200; may repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    from vestige.commands._shared import listed, print_json, whole
    from vestige.evidence.studies.study import study_named

    chosen = listed("--seeds", seeds, whole)
    study = study_named(name)(**_settings(changes or []))
    result = study.run(scale, chosen, model=model, out=out or Path(f"vestige-{name}"), device=device)  # type: ignore[arg-type]
    if as_json:
        print_json(result.summary())
    else:
        print(_digest(result))


def _settings(changes: list[str]) -> dict[str, Any]:
    import yaml

    from vestige.errors import SpecError

    settings = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SpecError(f"--set is {change!r}; allowed: NAME=VALUE")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SpecError(f"--set is {change!r}, whose value is no YAML") from None
    return settings


def _digest(result: StudyResult) -> str:
    """Claims, what was seen, and the verdict."""
    from vestige.commands._shared import wrap

    paper = result.study.paper
    lines = [wrap(f"{paper.title} ({paper.year}), {result.scale} scale, {len(result.seeds)} seeds"), ""]
    for finding in result.claims:
        lines += [
            wrap(finding.claim, 2),
            wrap(f"{finding.quantity}: {finding.spread}; due {finding.expected}", 4),
            f"    {'held' if finding.held else 'NOT HELD'}",
        ]
    verdict = result.verdict
    lines += ["", wrap(f"{verdict.status}: {verdict.seen}"), "", f"report  {result.report}\nledger  {result.ledger}"]
    return "\n".join(lines)
