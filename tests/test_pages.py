"""The tables and figures of the documentation are those of the results in benchmarks, and of the registry."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["context", "mixers", "quality", "speed", "weights"])
def test_tables_are_those_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"docs/scripts/{name}.py"
    module = script(path, monkeypatch)
    pages = [place.read_text(encoding="utf-8") for place in module.PAGES]
    for page in pages:
        assert module.written(page) == page, f"run: python {path}"
    for table in getattr(module, "TABLES", None) or module.tables():
        assert sum(f"<!-- {table}: begin -->" in page for page in pages) == 1, table


@pytest.mark.parametrize("room", ["context", "layers", "weights"])
def test_figures_are_those_of_the_results(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"benchmarks/{room}/figures.py"
    figures = script(path, monkeypatch).drawn()
    assert figures
    for name, figure in figures.items():
        held = (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8")
        assert figure == held, f"run: python {path}"
