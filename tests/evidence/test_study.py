"""The framework of studies: findings and verdicts, seeds that are taken up again, the command and the page."""

from __future__ import annotations

import json
import math

import pytest

from vestige.cli import main
from vestige.core.ledger import Ledger
from vestige.core.method import Paper, param
from vestige.core.registry import registry
from vestige.errors import InputError, SpecError
from vestige.evidence.report.page import Figure
from vestige.evidence.report.study_figures import bars, lines
from vestige.evidence.report.study_page import command
from vestige.evidence.studies.study import Bench, Finding, Study, study_named


class Coins(Study):
    """Throw coins; a study of the tests."""

    name = "coins-of-the-tests"
    paper = Paper(title="An example of the tests", year=2026, equations="none")
    FULL = {"throws": 400}  # noqa: RUF012

    throws: int = param(40, "coins thrown", ge=1)
    fails_at: int = param(-1, "the seed at which it is killed")

    def measure(self, seed, bench: Bench):
        import torch

        bench.tell(0.5, "throwing")
        if seed == self.fails_at:
            raise KeyboardInterrupt
        return {"heads": torch.rand(self.throws).round().mean().item(), "by throw": [0.0, 1.0 * seed]}

    def findings(self, seen):
        share = tuple(one["heads"] for one in seen)
        claim = "a coin is fair"
        return (
            Finding(claim=claim, quantity="share of heads", measured=share, at_least=0.2, at_most=0.8),
            Finding(claim=claim, quantity="heads above all", measured=share, at_least=0.9),
        )

    def figures(self, seen):
        rows = {"coin": {"heads": [one["heads"] for one in seen]}}
        drawn = lines({"coin": ([1, 2], [one["by throw"] for one in seen])}, across="throw", up="heads", log="x")
        return (
            Figure("shares", bars(rows, across="share", base=0.5), "Shares", "", "dots"),
            Figure("throws", drawn, "Throws", "", "lines"),
        )

    def about(self):
        return ("Coins are thrown.",)


@pytest.fixture(autouse=True)
def the_sample_is_registered_here_only():
    yield
    registry._defined.pop(Coins.name, None)
    registry.add(Coins)


def teardown_module():
    registry._defined.pop(Coins.name, None)


@pytest.mark.parametrize(
    ("bounds", "measured", "held", "expected"),
    [
        ({"at_least": 1}, (1.0, 2.0), True, "at least 1"),
        ({"at_least": 1}, (0.9, 2.0), False, "at least 1"),
        ({"at_most": 1}, (1.0, 0.0), True, "at most 1"),
        ({"at_least": 0, "at_most": 1}, (0.5, 1.1), False, "0 to 1"),
        ({"at_most": 1}, (math.nan,), False, "at most 1"),
    ],
)
def test_a_finding_holds_where_every_seed_lies_within_the_bounds(bounds, measured, held, expected):
    finding = Finding(claim="c", quantity="q", measured=measured, **bounds)
    assert finding.held is held and finding.expected == expected


def test_a_finding_that_nothing_could_contradict_is_refused():
    with pytest.raises(SpecError, match="no bound"):
        Finding(claim="c", quantity="q", measured=(1.0,))


def test_the_verdict_names_what_did_not_hold():
    result = Coins().run(progress=False)
    assert result.verdict.status == "not reproduced"
    assert "1 of 2 findings held" in result.verdict.seen and "heads above all" in result.verdict.seen
    assert "share of heads" not in result.verdict.seen
    assert list(result.table()["held"]) == [True, False]
    json.dumps(result.summary())


def test_a_killed_run_goes_on_at_the_seed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Coins(fails_at=1).run(seeds=(0, 1, 2), out=tmp_path, progress=False)
    assert [row["seed"] for row in Ledger(tmp_path / "ledger.jsonl").rows()] == [0]
    killed = Coins(fails_at=1).run(seeds=(0, 2), out=tmp_path, progress=False)
    assert killed.measured == 1 and killed.report.is_file()
    whole = Coins(fails_at=1).run(seeds=(0, 2), progress=False)
    assert whole.seen == killed.seen and whole.measured == 2


def test_other_settings_are_measured_anew(tmp_path):
    Coins().run(seeds=(0,), out=tmp_path, progress=False)
    assert Coins(throws=41).run(seeds=(0,), out=tmp_path, progress=False).measured == 1
    assert Coins().run("full", seeds=(0,), out=tmp_path, progress=False).measured == 1
    assert Coins().run(seeds=(0,), out=tmp_path, progress=False).measured == 0


def test_the_full_scale_keeps_what_the_user_has_changed():
    assert Coins().at("full").throws == 400
    assert Coins(throws=50).at("full").throws == 50
    with pytest.raises(SpecError, match="scale is 'huge'"):
        Coins().at("huge")


def test_the_page_tells_how_to_measure_the_same(tmp_path):
    result = Coins(throws=30).run("full", (3, 4), out=tmp_path, progress=False)
    assert command(result) == "vestige study coins-of-the-tests --scale full --seeds 3,4 --set throws=30"
    page = result.report.read_text(encoding="utf-8")
    assert command(result) in page and "not held" in page and 'id="shares"' in page


def test_wrong_use_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(SpecError, match="'model'"):
        Coins().run(model="smollm2", progress=False)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="no folder"):
        Coins().run(out=file, progress=False)
    with pytest.raises(SpecError, match="h2o"):
        study_named("h2o")


def test_the_command_prints_claims_and_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["study", Coins.name, "--seeds", "0,1", "--set", "throws=20"]
    assert main(words) == 0
    out, _ = capsys.readouterr()
    assert "a coin is fair" in out and "NOT HELD" in out and "not reproduced" in out
    assert (tmp_path / f"vestige-{Coins.name}" / "report.html").is_file()
    assert main([*words, "--json", "--out", "other"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [f["held"] for f in told["findings"]] == [True, False] and told["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["coin"], "unknown study 'coin'"),
        ([Coins.name, "--scale", "huge"], "scale is 'huge'"),
        ([Coins.name, "--seeds", "0,0"], "seeds is (0, 0)"),
        ([Coins.name, "--set", "throws"], "--set is 'throws'"),
        ([Coins.name, "--set", "throw=3"], "unknown parameter 'throw'"),
        ([Coins.name, "--device", "abacus"], "device is 'abacus'"),
    ],
)
def test_wrong_words_are_one_clear_line(words, names, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert names in line and not list(tmp_path.iterdir())
