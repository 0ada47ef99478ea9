"""The tables and figures of docs/layers.md are those of the results in benchmarks/layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_weights_page import ROOT, script

PAGE = ROOT / "docs" / "layers.md"
STUDIES = ROOT / "docs" / "studies.md"


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert script("docs/scripts/speed.py", monkeypatch).written(page) == page, "run: python docs/scripts/speed.py"


@pytest.mark.parametrize("place", [PAGE, STUDIES])
def test_tables_of_quality_are_those_of_the_results(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = place.read_text(encoding="utf-8")
    assert script("docs/scripts/quality.py", monkeypatch).written(page) == page, "run: python docs/scripts/quality.py"


def test_figures_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmarks/layers/figures.py", monkeypatch)
    figures = module.drawn()
    assert figures
    for name, figure in figures.items():
        held = (module.OUT / name).read_text(encoding="utf-8")
        assert figure == held, "run: python benchmarks/layers/figures.py"
