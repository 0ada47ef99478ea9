"""The recommendation: the best that fits, and whether the next is really worse."""

from __future__ import annotations

import json
import re

import pytest

from tests.evidence.rows import FULL_BYTES, compared, comparison, written
from vestige.cli import main
from vestige.errors import SpecError
from vestige.evidence.recommend import recommend


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """``sure`` beats ``close`` on one example of 30, and ``far`` on all; the two cheap ones are worse."""
    good = [1.0] * 10
    rows = []
    for seed in (0, 1, 2):
        rows += [
            compared("full", None, seed, good),
            compared("sure", 0.25, seed, good),
            compared("close", 0.25, seed, [0.0, *good[1:]] if seed == 0 else good),
            compared("far", 0.25, seed, [0.0] * 10),
            compared("cheap", 0.1, seed, [1.0] * 4 + [0.0] * 6),
            compared("cheaper", 0.05, seed, [0.0] * 10),
        ]
    return written(tmp_path_factory.mktemp("recommend") / "ledger.jsonl", [*rows, *_needle_of_another_length()])


def _needle_of_another_length():
    row = compared("other", 0.25, 0, [1.0])
    row["cell"]["task_label"] = "needle (length=2000)"
    row["task"]["length"] = 2000
    return [{**row, "key": "other"}]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The methods of these rows are not registered, so none of their parameters has a default."""
    monkeypatch.setattr("vestige.evidence.recommend.Recommendation._set", lambda self, name: False)


@pytest.mark.parametrize(
    ("asked", "method", "runner_up", "resolved"),
    [
        ({"budget": 0.25}, "sure", "close", False),
        ({"budget": "10%"}, "cheap", "cheaper", True),
        ({"budget": 0.05}, "cheaper", None, None),
        ({"memory": "5MB"}, "sure", "close", False),
        ({"memory": 0.25 * FULL_BYTES}, "sure", "close", False),
        ({"memory": "20MB", "contexts": 10}, "cheap", "cheaper", True),
        ({"budget": 1.0}, "sure", "full", False),
    ],
)
def test_the_best_that_fits_is_named_with_what_speaks_for_it(ledger, asked, method, runner_up, resolved):
    found = recommend(ledgers=[ledger], length=384, **asked)
    assert found.point.method == method and found.resolved is resolved
    assert (found.runner_up.method if found.runner_up else None) == runner_up
    assert found.point.kv_bytes <= found.allowed and found.point.seeds == 3
    told = json.loads(json.dumps(found.summary()))
    assert told["interval"][0] <= told["value"] <= told["interval"][1] and len(told["rows"]) == 3
    assert "3 seeds" in str(found) and f"vestige.method('{method}'" in str(found)


def test_memory_is_for_contexts_of_a_length(ledger):
    """5 MB for a context of 384 tokens are 26 MB for one of 2,000: of the same memory a longer context leaves less."""
    rows = [compared("a", share, seed, [float(share > 0.2)] * 3) for share in (0.1, 0.25) for seed in (0, 1)]
    path = written(ledger.parent / "short.jsonl", [compared("full", None, 0, [1.0] * 3), *rows])
    assert recommend(ledgers=[path], memory="5MB").point.budget == "25%"
    assert recommend(ledgers=[path], memory="5MB", length=768).point.budget == "10%"


def test_lower_may_be_better(tmp_path):
    path = written(tmp_path / "ledger.jsonl", comparison())
    found = recommend(ledgers=[path], budget=0.25, task="perplexity")
    assert found.point.method == "streaming-llm" and found.resolved and found.lead.value > 0
    assert found.point.value > found.full.value


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "either memory"),
        ({"memory": "4GB", "budget": 0.1}, "either memory"),
        ({"memory": "4 apples"}, "allowed"),
        ({"memory": "25%"}, "allowed: bytes"),
        ({"memory": "4GB", "contexts": 0}, "contexts is 0"),
        ({"budget": 1.5}, "allowed"),
        ({"budget": 0.1, "task": "nedle"}, "'nedle'; did you mean needle"),
        ({"budget": 0.1, "model": "smolm"}, "'smolm'; did you mean smollm2"),
        ({"budget": 0.1}, "several tasks of that name.*length=384.*length=2000"),
        ({"budget": 0.01, "length": 384}, "nothing .* fits into 200 kB .* cheaper at 5% with 970 kB"),
    ],
)
def test_what_cannot_be_answered_is_said(ledger, asked, says):
    with pytest.raises(SpecError, match=says):
        recommend(ledgers=[ledger], **asked)


def test_without_a_ledger_a_quick_comparison_is_run_once(toy, tmp_path, monkeypatch):
    from vestige.evidence import recommend as module

    monkeypatch.undo()
    few = {"methods": ("streaming-llm", "h2o"), "seeds": (0,), "examples": 2, "timed": 0}
    monkeypatch.setattr(module, "QUICK", few)
    found = recommend(toy, memory="8kB", length=256, out=tmp_path, progress=False)
    assert found.point.method in ("streaming-llm", "h2o") and found.point.kv_bytes <= found.allowed
    assert found.allowed == pytest.approx(8000, rel=0.01)
    assert re.search(r"vestige.method\('[\w-]+', budget=\d+", found.command)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    recommend(toy, memory="8kB", length=256, out=tmp_path, progress=False)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    with pytest.raises(SpecError, match="needs the length"):
        recommend(toy, memory="8kB", out=tmp_path, progress=False)


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    path = written(tmp_path / "ledger.jsonl", comparison())
    monkeypatch.undo()
    assert main(["recommend", str(path), "--budget", "0.25", "--task", "perplexity"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("streaming-llm at 25%: 13.1") and "resolved: ahead of h2o" in out
    assert main(["recommend", str(path), "--budget", "0.25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"]["name"] == "streaming-llm"
    assert main(["recommend", str(path)]) == 2
