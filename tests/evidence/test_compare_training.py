"""Comparing layers by what small models of them learn: every model is trained once, apart from the others."""

from __future__ import annotations

import json

import pytest

from vestige.cli import main
from vestige.core.ledger import Ledger
from vestige.errors import SpecError
from vestige.evidence.compare import compare, rerun
from vestige.evidence.compare.spec import read_spec
from vestige.evidence.compare.training import Sizes, TrainingComparison
from vestige.evidence.ledgers import read_ledgers
from vestige.evidence.points import points_of
from vestige.evidence.recommend import recommend
from vestige.evidence.report.ledger_page import markdown

TINY = {
    "tasks": [{"name": "mqar", "length": 12, "pairs": 2, "keys": 4, "values": 4}, "last-write-wins"],
    "methods": ["softmax", "delta-net"],
    "models": {"layers": 1, "hidden": 16},
    "seeds": [0, 1],
    "steps": 3,
    "rows": 4,
    "examples": 8,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return compare(TINY, out=tmp_path_factory.mktemp("training"), progress=False)


def test_every_model_is_one_row_with_its_state_and_its_answers(finished):
    rows = list(finished.ledger.rows())
    assert len(rows) == finished.estimate.cells == finished.estimate.missing == 8 and not finished.failed
    assert finished.estimate.seconds > 0
    for row in rows:
        assert row["model"] == "1 layer of 16, 2 heads" and row["seconds"] > 0 and row["metrics"]["loss"] > 0
        assert len(row["scored"]["values"]) == 8 and row["scored"]["ceiling"] == 1.0 and row["metrics"]["parameters"]
        assert row["scored"]["chance"] == pytest.approx(1 / row["task"]["values"])
    held = {(row["method"]["name"], row["task"]["name"]): row["kv_bytes"] for row in rows}
    assert held["softmax", "last-write-wins"] == 64 / 12 * held["softmax", "mqar"]  # grows with the row
    assert held["delta-net", "last-write-wins"] == held["delta-net", "mqar"]  # does not


def test_seeds_make_one_point_and_a_second_run_trains_nothing(finished):
    points = points_of(finished.rows).all
    assert len(points) == 4 and all(point.seeds == 2 and len(point.values) == 16 for point in points)
    again = compare(TINY | {"batch": 3}, out=finished.ledger.path.parent, progress=False)
    assert again.measured == again.estimate.missing == 0 and len(again.rows) == 8
    planned = compare(TINY | {"steps": 4}, out=finished.ledger.path.parent, progress=False, dry_run=True)
    assert planned.estimate.missing == 8


def test_a_cell_alone_and_a_cell_again_are_the_same(finished, tmp_path, capsys):
    row = finished.rows[-1]
    alone = compare(
        TINY | {"tasks": "last-write-wins", "methods": "delta-net", "seeds": 1}, out=tmp_path, progress=False
    )
    assert alone.rows[0]["key"] == row["key"] and alone.rows[0]["scored"] == row["scored"]
    assert rerun(finished.ledger.path, row["key"]).same
    assert main(row["command"].split()[1:]) == 0
    assert "every example has the value that was recorded" in capsys.readouterr().out


def test_answers_do_not_depend_on_the_batch(finished, tmp_path):
    other = compare(TINY | {"batch": 3, "tasks": "last-write-wins", "seeds": 0}, out=tmp_path, progress=False)
    known = {row["key"]: row["scored"]["values"] for row in finished.rows}
    assert all(known[row["key"]] == row["scored"]["values"] for row in other.rows)


def test_what_cannot_be_trained_is_recorded_and_tried_again(tmp_path):
    wild = TINY | {"tasks": "last-write-wins", "seeds": 0, "steps": 8, "rate": 1e30}
    for _ in range(2):
        found = compare(wild, out=tmp_path, progress=False)
        assert {row["error"]["type"] for row in found.failed} == {"TrainingError"}, found.failed
    assert len(list(Ledger(tmp_path / "ledger.jsonl").rows())) == 2 * len(found.failed)


def test_the_page_and_the_recommendation_know_layers(finished):
    told = markdown(read_ledgers([finished.ledger.path]))
    assert "| delta-net | " in told and "| budget |" not in told and "mqar" in told and "per context" in told
    found = recommend("1 layer of 16, 2 heads", memory="1GB", task="mqar", ledgers=[finished.ledger.path])
    assert found.command.startswith("vestige.models.VestigeConfig(blocks=[vestige.method(")


GOOD = """\
tasks:
  - mqar
  - name: state-tracking
    group: S3
methods: [delta-net, softmax]
models:
  layers: 1
  hidden: 16
steps: 5
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("- mqar", "- mqr", 2, "unknown task 'mqr'; did you mean mqar?"),
        ("- mqar", "- needle", 9, "'steps' goes with tasks that a model is trained on; the tasks here are tasks that"),
        ("group: S3", "group: S9", 4, "'group' is 'S9'"),
        ("delta-net", "delta-nett", 5, "unknown method 'delta-nett'; did you mean delta-net"),
        ("delta-net", "h2o", 5, "'h2o' is a .*, where a Mixer is wanted"),
        ("hidden: 16", "hidden: 15", 5, "delta-net in a model with 1 layer of 15, 2 heads: .*does not divide"),
        ("hidden: 16", "hiden: 16", 6, "hiden"),
        ("steps: 5", "steps: 0", 9, "'steps' is 0"),
        ("steps: 5", "step: 5", 9, "unknown field 'step'; did you mean steps"),
        ("steps: 5", "budgets: 0.5", 9, "'budgets' goes with tasks that read a context; the tasks here are tasks that"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(old, new, line, says, tmp_path, capsys):
    import re

    path = tmp_path / "spec.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert f"{path}:{line}: " in complaint and re.search(says, complaint), complaint
    assert not (tmp_path / "out").exists()


def test_a_description_says_what_kind_it_is(tmp_path):
    (tmp_path / "spec.yaml").write_text(GOOD)
    chosen = read_spec(tmp_path / "spec.yaml")
    assert isinstance(chosen, TrainingComparison) and chosen.models == (Sizes(layers=1, hidden=16),)
    assert len(read_spec(json.loads(json.dumps(TINY))).tasks) == 2
    with pytest.raises(SpecError, match="'cud', which names no device"):
        compare(TINY | {"device": "cud"}, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
