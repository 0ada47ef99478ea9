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
        held = (ROOT / "docs" / "figures" / name).read_text(encoding="utf-8")
        assert figure == held, "run: python benchmarks/layers/figures.py"


def test_models_that_are_cut_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model that is stopped after half of its steps ends, in the next job, as one that was not."""
    quality = script("benchmarks/layers/quality.py", monkeypatch)
    sizes = {"width": 32, "seed": 0, "rate": 3e-3, "keys": 8, "loads": [2, 4], "tokens": 64, "steps": 8, "heads": 2}
    cells = [{"blocks": "linear-attention", **sizes}]
    looks = iter([0] * 5 + [9] * 9)  # the clock, before a job and before each round of steps

    def job(parts: Path | None, end: float) -> list[tuple[dict, dict]]:
        return quality.work(quality.Job("recall", cells, None, parts, end))

    whole = job(None, float("inf"))
    monkeypatch.setattr(quality.time, "time", lambda: next(looks))
    assert job(tmp_path, 5) == [] and len(list(tmp_path.iterdir())) == 1
    assert job(tmp_path, 5) == []  # too late to begin
    assert job(tmp_path, float("inf")) == whole
    assert [cell for cell, _ in whole] == cells and all("accuracy" in found for _, found in whole)
