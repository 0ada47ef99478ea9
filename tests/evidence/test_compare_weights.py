"""Comparing learners on streams and erasers on splits: the same examples and weights for all, each on its own."""

from __future__ import annotations

import math

import pytest

import vestige
from vestige.cli import main
from vestige.errors import SpecError
from vestige.evidence.compare import compare, rerun
from vestige.evidence.compare.weights import ErasureWorker
from vestige.evidence.ledgers import read_ledgers
from vestige.evidence.points import points_of
from vestige.evidence.report.ledger_page import ledger_page, markdown

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SAME = {"models": {"new": VIT}, "learn": {"epochs": 1, "learning_rate": 5e-3}, "seeds": [0, 1], "device": "cpu"}
STREAM = {
    "tasks": {"name": "experience-stream", "limit": 60, "experiences": [[0, 1], [2, 3]]},
    "methods": ["finetune", {"name": "replay", "size": 10}],
    **SAME,
}
SPLIT = {
    "tasks": {"name": "erasure-split", "limit": 80},
    "methods": ["ssd", {"name": "gradient-ascent", "epochs": 1}],
} | SAME


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return compare(STREAM, out=tmp_path_factory.mktemp("streams"), progress=False)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory):
    return compare(SPLIT, out=tmp_path_factory.mktemp("splits"), progress=False)


def test_learners_have_a_row_for_each_seed_with_its_matrix(learnt):
    assert not learnt.failed and learnt.measured == learnt.estimate.cells == learnt.estimate.readings == 4
    assert learnt.estimate.seconds > 0
    for row in learnt.rows:
        assert row["scored"]["values"] == row["matrix"][-1] and row["scored"]["chance"] == 0.1
        assert row["metrics"]["accuracy"] == pytest.approx(row["metrics"]["average"])
    held = {row["method"]["name"]: row["replay_bytes"] for row in learnt.rows}
    assert held["finetune"] == 0 < held["replay"]
    page = ledger_page(read_ledgers([learnt.ledger.path]))
    assert "forgetting" in {section.name for section in page.sections}
    assert "experience-stream" in markdown(read_ledgers([learnt.ledger.path]))


def test_erasers_of_a_seed_share_what_was_taught(forgotten):
    assert not forgotten.failed and forgotten.measured == 4 and forgotten.estimate.readings == 2
    retrained = {name: set() for name in (0, 1)}
    for row in forgotten.rows:
        metrics = row["metrics"]
        parts = [
            1 - abs(metrics[f"{n}_accuracy"] - metrics[f"retrained_{n}_accuracy"])
            for n in ("forget", "retain", "unseen")
        ]
        assert row["scored"]["values"] == [pytest.approx(math.prod(parts))] and row["scored"]["ceiling"] == 1.0
        retrained[row["seed"]].add(metrics["retrained_retain_accuracy"])
    assert all(len(values) == 1 for values in retrained.values())
    assert {point.seeds for point in points_of(forgotten.rows).all} == {2}
    assert "| ssd |" in markdown(read_ledgers([forgotten.ledger.path]))


@pytest.mark.parametrize("which", ["learnt", "forgotten"])
def test_a_second_run_measures_nothing_and_a_cell_again_is_the_same(which, request, capsys):
    found = request.getfixturevalue(which)
    spec = STREAM if which == "learnt" else SPLIT
    assert compare(spec, out=found.ledger.path.parent, progress=False).measured == 0
    row = found.rows[-1]
    assert rerun(found.ledger.path, row["key"]).same
    assert main(row["command"].split()[1:]) == 0
    assert "every example has the value that was recorded" in capsys.readouterr().out


def test_an_eraser_that_fails_leaves_the_others(tmp_path, monkeypatch):
    from vestige.weights.erase.ssd import SSD

    def fails(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(SSD, "erase", fails)
    found = compare(SPLIT | {"seeds": 0}, out=tmp_path, progress=False)
    assert [row["method"]["name"] for row in found.failed] == ["ssd"] and len(found.rows) == 2


def test_what_a_split_is_worth():
    task = vestige.task("erasure-split")
    assert task.scored({"forget": 0.0, "retain": 1.0}, {"forget": 0.0, "retain": 1.0}).values == (1.0,)
    assert task.scored({"forget": 0.5, "retain": 0.8}, {"forget": 0.0, "retain": 1.0}).value == pytest.approx(0.4)
    assert vestige.task("experience-stream", kind="task").chance is None


def test_a_file_is_part_of_the_task(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"question": "q?", "answer": "a"}\n')
    task = vestige.task("erasure-split", data="jsonl", file=str(path))
    spec = task.spec()
    assert type(task).from_spec(spec) == task
    path.write_text('{"question": "q?", "answer": "b"}\n')
    with pytest.raises(SpecError, match="its examples are others"):
        type(task).from_spec(spec)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": "retrain"}, "retrain is what all are measured by"),
        ({"methods": "finetune"}, "'finetune' is a .*, where a Eraser is wanted"),
        ({"models": {"new": {"hiden_size": 3}}}, "unknown field 'hiden_size'; did you mean hidden_size"),
        ({"models": {"new": {}, "load": "x"}}, "'load' or 'new'"),
        ({"learn": {"epochs": 0}}, "epochs"),
        ({"budgets": 0.5}, "'budgets' goes with tasks that read a context"),
        ({"tasks": {"name": "erasure-split", "column": "topic", "limit": 80}}, "names 'topic'"),
        ({"tasks": {"name": "erasure-split", "file": "x"}}, "takes no file"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_taught(changes, says, tmp_path, monkeypatch):
    monkeypatch.setattr(ErasureWorker, "run", None)
    with pytest.raises(SpecError, match=says):
        compare(SPLIT | changes, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
