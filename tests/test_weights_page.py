"""The tables and figures of learning and forgetting are those of the results in benchmarks/weights."""

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


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("docs/scripts/weights.py", monkeypatch)
    pages = [place.read_text(encoding="utf-8") for place in module.PAGES]
    for page in pages:
        assert module.written(page) == page, "run: python docs/scripts/weights.py"
    for name in module.tables():
        assert sum(f"<!-- {name}: begin -->" in page for page in pages) == 1, name


def test_figures_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmarks/weights/figures.py", monkeypatch)
    figures = module.drawn()
    assert figures
    for name, figure in figures.items():
        held = (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8")
        assert figure == held, "run: python benchmarks/weights/figures.py"
