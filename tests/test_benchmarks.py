"""The benchmark of quality goes on where it was cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_pages import script


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
