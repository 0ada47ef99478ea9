"""A study's page: what the paper claims and what was seen of it, then what that rests on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.evidence.report.page import Answers, Code, Page, Section, Table, Text, versions_line, write_page

if TYPE_CHECKING:
    import os

    from vestige.evidence.studies.study import Finding, StudyResult

__all__ = ["command", "study_page", "write_study_report"]


def write_study_report(result: StudyResult, path: str | os.PathLike[str]) -> Path:
    """Write the page of a study."""
    return write_page(study_page(result), path)


def study_page(result: StudyResult) -> Page:
    """The report of a study."""
    paper = result.study.paper
    where = ", ".join(str(part) for part in (paper.venue, paper.year, paper.url) if part)
    on = "" if result.model is None else f" on {result.model}"
    held = sum(finding.held for finding in result.claims)
    answers = [
        (result.verdict.status, f"{held} of {len(result.claims)} findings held for every seed{on}."),
        *((f"{finding.mean:.3g}", _told(finding)) for finding in result.claims),
    ]
    return Page(
        title=f"{paper.title}: seen again?",
        subtitle=(
            f"The study {result.name} at {result.scale} scale, {_seeds(result)}{on}, in {result.seconds:.0f} s. "
            f"The paper: {where}."
        ),
        sections=[
            Section("answers", "In short", [Answers(answers)]),
            Section("findings", "Claims and what was seen", [_findings(result)]),
            Section("figures", "Figures", list(result.figures())),
            Section("method", "How this was measured", _method(result)),
        ],
        footer=versions_line(),
    )


def command(result: StudyResult) -> str:
    """The command that measures the same."""
    words = ["vestige", "study", result.name, "--scale", result.scale, "--seeds", ",".join(map(str, result.seeds))]
    if result.model not in (None, result.study.MODEL):
        words += ["--model", str(result.model)]
    plain = type(result.study)().at(result.scale).spec()
    changed = {key: value for key, value in result.study.spec().items() if value != plain[key]}
    for key, value in changed.items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)


def _seeds(result: StudyResult) -> str:
    return f"{len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"


def _told(finding: Finding) -> str:
    """The claim, what was measured of it, and whether it held."""
    low, high = min(finding.measured), max(finding.measured)
    return (
        f"{finding.quantity} ({low:.3g} to {high:.3g}; due: {finding.expected}). {finding.claim}: "
        f"{'held' if finding.held else 'not held'}."
    )


def _findings(result: StudyResult) -> Table:
    rows = [
        [
            finding.claim,
            finding.expected,
            *(f"{value:.3g}" for value in finding.measured),
            "held" if finding.held else "not held",
        ]
        for finding in result.claims
    ]
    columns = ["the paper's claim", "due", *(f"seed {seed}" for seed in result.seeds), ""]
    return Table(columns, rows, "A finding holds where it holds for every seed.")


def _method(result: StudyResult) -> list[Any]:
    spec = {key: value for key, value in result.study.spec().items() if key != "name"}
    rows = [[key, type(result.study).parameters()[key]["help"], str(value)] for key, value in spec.items()]
    return [
        *map(Text, result.study.about()),
        Table(["setting", "what it is", "value"], rows, "Settings", labels=2),
        Text("The command that measured this:"),
        Code(command(result)),
    ]
