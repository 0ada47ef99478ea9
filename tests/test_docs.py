"""The Python in the documentation runs as it stands, page by page, and links between its files lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vestige import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
GENERATED = {"catalogue.md"}
LONG = {"tasks.md", "tutorial.md"}  # half a minute and more each, with the embedded model


def runnable() -> list[Any]:
    """The pages with code, those that take long for the slow run."""
    pages = [page for page in PAGES if BLOCK.search(page.read_text())]
    return [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in LONG else []) for p in pages]


@pytest.mark.parametrize("page", runnable())
def test_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = "\n".join(BLOCK.findall(page.read_text()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands() -> list[tuple[str, str]]:
    """Every command line of Vestige that a page shows, with the page's name."""
    lines = [
        (page.name, line) for page in PAGES for block in SHELL.findall(page.read_text()) for line in block.split("\n")
    ]
    return [(name, line) for name, line in lines if line.startswith("vestige ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_of_a_page_are_understood(page: str, line: str) -> None:
    """Verb, arguments and options are there; nothing is run."""
    _, verb, *words = shlex.split(line, comments=True)
    cli._read(cli._find(verb), verb, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists() or target in GENERATED, f"{page.name} links to {target}"
