"""The Python in the documentation runs as it stands, page by page, and links between its files lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

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


RUNNER = """
import json, os, sys, traceback
import vestige
from functools import cache

vestige.models.load = cache(vestige.models.load)  # pages that ask for the same model share it
for name, code in json.load(sys.stdin):
    os.makedirs(name)
    os.chdir(name)
    try:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        went = ""
    except BaseException:
        went = traceback.format_exc()
    os.chdir("..")
    with open(name + ".json", "w") as file:
        json.dump(went, file)
"""


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of a page's code. All pages of a run go through one process, so that imports are paid once, each with
    names and a folder of its own; where tests run side by side, the first that asks runs them for all."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pages"

    def run(page: Path, slow: bool) -> str:
        folder = shared / ("slow" if slow else "quick")
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                pages = [(p.name, "\n".join(BLOCK.findall(p.read_text()))) for p in PAGES if (p.name in LONG) == slow]
                code = json.dumps([page for page in pages if page[1]])
                subprocess.run([sys.executable, "-c", RUNNER], cwd=folder, input=code, text=True, check=False)
        told = folder / f"{page.name}.json"
        return json.loads(told.read_text()) if told.exists() else "the process ended before this page"

    shared.mkdir(exist_ok=True)
    return run


@pytest.mark.parametrize("page", runnable())
def test_python_of_a_page_runs(page: Path, outcome: Any) -> None:
    went = outcome(page, page.name in LONG)
    assert not went, went


def commands(own: bool) -> list[tuple[str, str]]:
    """Every command line of Vestige that a page shows, or every other one, with the page's name."""
    lines = [
        (page.name, line) for page in PAGES for block in SHELL.findall(page.read_text()) for line in block.split("\n")
    ]
    return [(name, line) for name, line in lines if line and line.startswith("vestige ") == own]


@pytest.mark.parametrize(("page", "line"), commands(own=True))
def test_commands_of_a_page_are_understood(page: str, line: str) -> None:
    """Verb, arguments and options are there; nothing is run."""
    _, verb, *words = shlex.split(line, comments=True)
    cli._read(cli._find(verb), verb, words)


@pytest.mark.parametrize(("page", "line"), commands(own=False))
def test_other_commands_of_a_page_name_what_is_there(page: str, line: str) -> None:
    """Targets of make, extras of the package, files."""
    tool, *words = shlex.split(line, comments=True)
    if tool == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif tool == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in extras for word in words for extra in re.findall(r"vestige\[(.+)\]", word))
    else:
        assert tool == ".venv/bin/python", f"{page} shows a command that no test knows"
        assert all((ROOT / word).exists() for word in words if "/" in word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists() or target in GENERATED, f"{page.name} links to {target}"


def test_figures_of_the_catalogue_are_of_methods() -> None:
    from vestige.core.registry import registry

    drawn = {path.stem for path in (ROOT / "docs" / "figures" / "methods").glob("*.svg")}
    assert drawn and drawn <= {card.name for card in registry.cards()}
