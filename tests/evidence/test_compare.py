"""The comparison: equal bytes are equal, cells stand alone, nothing is measured twice, and what is wrong is named."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter

import pytest

import vestige
from tests.evidence.conftest import rows_when_killed
from vestige.cli import main
from vestige.core.ledger import Ledger
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.evidence.amounts import Amount
from vestige.evidence.compare import compare, rerun
from vestige.evidence.compare.spec import Comparison, read_spec
from vestige.evidence.compare.work import Worker, most_within
from vestige.evidence.points import points_of

METHODS = ["streaming-llm", "h2o", {"name": "quantised-cache", "bits": 8, "policy": {"name": "h2o"}}, "quantised-cache"]
SMALL = {
    "tasks": [{"name": "needle", "length": 160}],
    "methods": METHODS,
    "budgets": [0.3, 0.5],
    "seeds": [0, 1],
    "examples": 2,
    "timed": 2,
}
CELLS = 2 * (2 + 3 * 2)  # seeds, full and quantised-cache as they stand, three methods at two budgets


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    return compare(models=toy, out=tmp_path_factory.mktemp("compare"), progress=False, **SMALL)


def test_every_cell_is_one_row_and_the_model_is_left_alone(finished, toy):
    rows = list(finished.ledger.rows())
    assert len(rows) == len(finished.rows) == finished.measured == finished.estimate.missing == CELLS
    assert max(Counter(row["key"] for row in rows).values()) == 1
    assert not finished.failed and not Patch.active(toy[0])
    assert finished.estimate.seconds > 0 and finished.estimate.readings == 2 * 3


def test_equal_bytes_are_equal_and_thin_entries_are_more(finished):
    points = points_of(finished.rows).all
    whole = next(point.kv_bytes for point in points if point.method == "full")
    entries = {}
    for point in points:
        if point.budget:
            share = float(point.budget.rstrip("%")) / 100
            assert 0.9 * share * whole < point.kv_bytes <= share * whole, point.method
            inner = point.spec.get("policy", point.spec)
            entries[point.method, point.budget] = inner["budget"]
    assert entries["quantised-cache (policy=h2o, bits=8)", "50%"] > 1.3 * entries["h2o", "50%"]
    assert {p.method for p in points if not p.budget} == {"full", "quantised-cache"}


def test_a_cell_alone_is_what_it_is_among_others(finished, toy, tmp_path):
    alone = compare(models=toy, out=tmp_path, progress=False, **SMALL | {"methods": "h2o", "seeds": 1, "budgets": 0.5})
    told = {row["key"]: row for row in finished.rows}
    again = [row for row in alone.rows if row["method"]["name"] == "h2o"]
    assert len(again) == 1
    for row in again:
        assert told[row["key"]]["scored"] == row["scored"] and told[row["key"]]["kv_bytes"] == row["kv_bytes"]


def test_time_is_measured_with_the_first_seed_alone(finished):
    timed = {row["seed"] for row in finished.rows if "decode_seconds_per_token" in row["metrics"]}
    assert timed == {0}
    assert all(point.seconds_per_token > 0 for point in points_of(finished.rows).all)


def test_a_second_run_measures_nothing_and_another_budget_only_what_is_new(toy, tmp_path):
    few = SMALL | {"methods": "h2o", "seeds": 0}
    first = compare(models=toy, out=tmp_path, progress=False, **few)
    again = compare(models=toy, out=tmp_path, progress=False, **few)
    assert first.measured == 3 and again.measured == 0
    assert [row["metrics"] for row in again.rows] == [row["metrics"] for row in first.rows]
    assert compare(models=toy, out=tmp_path, progress=False, **few | {"budgets": [0.3, 0.6]}).measured == 1
    before = (tmp_path / "ledger.jsonl").read_bytes()
    planned = compare(models=toy, out=tmp_path, progress=False, dry_run=True, **few | {"seeds": [0, 5]})
    assert planned.estimate.missing == 3 and (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_cell_that_fails_is_recorded_and_the_rest_carried_on(toy, tmp_path):
    """SnapKV's window alone is more than the budget allows; h2o is measured all the same, and SnapKV tried again."""
    settings = SMALL | {"methods": ["snapkv", "h2o", "tidal-decode"], "budgets": 0.2, "seeds": 0}
    found = compare(models=toy, out=tmp_path, progress=False, **settings)
    errors = {row["method"]["name"]: row["error"]["text"] for row in found.failed}
    assert set(errors) == {"snapkv", "tidal-decode"}
    assert "window_size" in errors["snapkv"] and "layers 0 to 1" in errors["tidal-decode"]
    assert {row["method"]["name"] for row in found.rows if "error" not in row} == {"full", "h2o"}
    again = compare(models=toy, out=tmp_path, progress=False, **settings)
    assert again.estimate.missing == len(again.failed) == 2
    keys = [row["key"] for row in Ledger(tmp_path / "ledger.jsonl")]
    assert sum("failed-2" in key for key in keys) == 2
    assert not Patch.active(toy[0])


def test_entries_of_equal_time_lie_between_the_measured_sizes(toy, monkeypatch):
    from vestige.context.evict.h2o import H2O
    from vestige.evidence.compare import work

    def seconds(model, policy, ids, tokens):
        held = ids.shape[1] if policy.name == "full" else policy.budget
        return 0.0, [1.0 + 0.01 * held] * tokens, 0

    monkeypatch.setattr(work, "time_policy", seconds)
    worker, found = Worker(), {}
    for budget in ("3s", "2s", 1.0, "1.1s"):
        try:
            found[budget] = worker._entries_in_time(toy[0], H2O(budget=1.0), Amount.of(budget), 200, 3)
        except InputError as error:
            found[budget] = str(error)
    assert found["3s"] == found[1.0] == 200 and found["2s"] == 100
    assert "25 entries" in found["1.1s"] and "1.1e+03 ms" in found["1.1s"]


@pytest.mark.parametrize("allowed", [0, 7, 8, 55, 99, 10_000])
def test_the_largest_number_within_is_found(allowed):
    assert most_within(lambda n: 8 * n, allowed, 100) == min(100, allowed // 8)


def test_killed_in_the_middle_it_goes_on_where_it_was(toy_folder, tmp_path):
    spec = {"models": [str(toy_folder)], **SMALL, "methods": ["h2o"], "seeds": list(range(10)), "device": "cpu"}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = [
        sys.executable,
        "-m",
        "vestige.cli",
        "compare",
        str(tmp_path / "spec.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    ledger = tmp_path / "out" / "ledger.jsonl"
    before = rows_when_killed(words, ledger, 5)
    found = compare(tmp_path / "spec.yaml", out=tmp_path / "out", progress=False)
    rows = list(Ledger(ledger).rows())
    assert found.measured == len(rows) - before > 0
    assert len(rows) == len({row["key"] for row in rows}) == 10 * 3 and Ledger(ledger).broken == 0


def test_the_command_of_a_row_measures_the_same_again(toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"methods": "h2o", "seeds": 3, "device": "cpu"}
    found = compare(models=str(toy_folder), out="out", progress=False, **settings)
    (tmp_path / "spec.yaml").write_text(json.dumps({"models": str(toy_folder), **settings}))
    assert main(["compare", "spec.yaml", "--out", "out", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "h2o" in told and "50%" in told and "vestige report out/ledger.jsonl" in told
    assert main(["compare", "spec.yaml", "--out", "out", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing"] == 0 and "nothing to do" in captured.err

    row = next(row for row in found.rows if row["budget"] is not None)
    words = row["command"].split()
    assert words[:2] == ["vestige", "compare"] and words[-1] == row["key"]
    before = found.ledger.path.read_bytes()
    assert main(words[1:]) == 0
    assert "every example has the value that was recorded" in capsys.readouterr().out
    again = rerun(found.ledger.path, row["key"])
    assert again.same and again.now["method"] == row["method"] and again.now["kv_bytes"] == row["kv_bytes"]
    assert found.ledger.path.read_bytes() == before
    assert main(["compare", str(found.ledger.path), "--only", row["key"][:-2] + "zz"]) == 2
    assert f"did you mean {row['key']}" in capsys.readouterr().err


GOOD = """\
models: [smollm2]
tasks:
  - name: needle
    length: 300
methods:
  - h2o
  - name: a2sf
    forgetting: 0.9
budgets: [0.25, 4MB]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("- h2o", "- h20", 6, "unknown method 'h20'; did you mean h2o?"),
        ("name: needle", "name: nedle", 3, "unknown task 'nedle'; did you mean needle"),
        ("length: 300", "lenght: 300", 4, "unknown parameter 'lenght' .*did you mean length?"),
        ("length: 300", "length: 0", 4, "'length' is 0"),
        ("forgetting: 0.9", "forgetting: 9.5", 8, "'forgetting' is 9.5"),
        ("name: a2sf\n    forgetting: 0.9", "name: retrieval-heads", 7, "is a .*Probe.* where a CachePolicy is wanted"),
        ("4MB", "4XB", 9, "'4XB'; allowed"),
        ("4MB", "1.5", 9, "1.5; allowed"),
        ("4MB", "64", 9, "64 entries in a comparison at equal bytes"),
        ("budgets:", "budget:", 9, "unknown field 'budget'; did you mean budgets?"),
        ("[0.25, 4MB]", "[0.25, 0.25]", 9, "twice"),
        ("models: [smollm2]", "models: []", 1, "models"),
        ("models: [smollm2]", "models: [smollm2]\nseeds: [1, x]", 2, "seeds.1"),
        ("models: [smollm2]", "models: [smollm2]\nexamples: 0", 2, "examples"),
        ("models: [smollm2]", "models: [smollm2]\nequal: byte", 2, "equal"),
        ("models: [smollm2]", "models: [smolm2]", 1, "no model 'smolm2'.* did you mean smollm2?"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_nothing_is_written(
    old, new, line, says, tmp_path, capsys, monkeypatch
):
    import re

    monkeypatch.setattr("vestige.models.hub._on_the_hub", lambda *given: False)
    path = tmp_path / "spec.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert f"{path}:{line}: " in complaint and re.search(says, complaint), complaint
    assert not (tmp_path / "out").exists()


def test_what_the_documentation_shows_is_right(tmp_path):
    """The YAML in the page is that of the example, commands have the options that they are shown with."""
    import inspect
    import re
    import shlex
    from pathlib import Path

    import yaml

    root = Path(__file__).resolve().parents[2]
    page, example = (root / "docs/compare.md").read_text(), root / "examples/compare-context.yaml"
    shown = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    examples = [example, root / "examples/compare-layers.yaml"]
    assert [*map(yaml.safe_load, shown)] == [yaml.safe_load(path.read_text()) for path in examples]
    assert len(read_spec(examples[1]).methods) >= 5
    chosen = read_spec(example)
    assert len(chosen.methods) >= 7 and len(chosen.seeds) == 3
    (tmp_path / "compare.yaml").write_text(GOOD.replace("0.9", "9.5"))
    with pytest.raises(SpecError) as caught:
        read_spec(tmp_path / "compare.yaml")
    (told,) = re.findall(r"^vestige: (compare.yaml.*)$", page, re.MULTILINE)
    assert str(caught.value) == str(tmp_path / told)
    commands = re.findall(r"^vestige (.*?)(?: +#.*)?$", "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)), re.M)
    assert len(commands) >= 8
    for words in map(shlex.split, commands):
        module = __import__(f"vestige.commands.{words[0]}", fromlist=["run"])
        options = {f"--{name.replace('_', '-')}" for name in inspect.signature(module.run).parameters}
        assert {word for word in words if word.startswith("--")} <= options, words


def test_a_file_that_is_no_description_is_refused(tmp_path):
    path = tmp_path / "spec.yaml"
    for text, says in (("a: [1", "no YAML"), ("- 1", "holds no fields"), ("models: x\n", "'tasks' is missing")):
        path.write_text(text)
        with pytest.raises(SpecError, match=says):
            read_spec(path)
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(tmp_path / "absent.yaml")
    path.write_text(GOOD)
    assert isinstance(read_spec(path), Comparison)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": [{"name": "needle", "length": 4000}]}, "4000.* 2048"),
        ({"budgets": "1GB"}, "1.0 GB is larger than the full cache.* 2,048"),
        ({"budgets": 4000, "equal": "entries"}, "4000 entries is larger"),
        ({"engine": "rai"}, "did you mean ray?"),
        ({"engine": "ray"}, "by name or folder"),
        ({"tasks": ["needle", {"name": "needle", "length": 1000}]}, "twice"),
    ],
)
def test_what_is_beyond_the_model_or_the_engine_is_refused_before_anything_runs(settings, says, toy, tmp_path):
    pytest.importorskip("ray") if settings.get("engine") == "ray" else None
    with pytest.raises(SpecError, match=says):
        compare(models=toy, out=tmp_path / "out", progress=False, **SMALL | settings)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_that_installs_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vestige.evidence.engine.ray.importlib.util.find_spec", lambda name: None)
    (tmp_path / "spec.yaml").write_text(GOOD)
    assert main(["compare", str(tmp_path / "spec.yaml"), "--engine", "ray", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'vestige[ray]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_ledger_of_another_version_is_refused_and_broken_lines_are_told(finished, toy_folder, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(json.dumps({"models": str(toy_folder), **SMALL, "device": "cpu"}))
    text = finished.ledger.path.read_text()
    for name, content in (
        ("newer", text.replace('"schema": 1', '"schema": 99')),
        ("broken", text + '{"schema": 1, "k'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ledger.jsonl").write_text(content)
        words = ["compare", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / name), "--dry-run"]
        assert main(words) == (2 if name == "newer" else 0)
        assert (tmp_path / name / "ledger.jsonl").read_text() == content
        told = capsys.readouterr().err
        assert ("newer Vestige (schema 99)" if name == "newer" else "1 broken line in the ledger skipped") in told
    assert main(["compare", str(tmp_path / "newer" / "ledger.jsonl"), "--only", "x"]) == 2
    assert main(["compare", str(tmp_path / "absent.jsonl"), "--only", "x"]) == 2


@pytest.mark.parametrize(
    ("given", "value", "unit"),
    [
        (0.25, 0.25, "share"),
        ("25%", 0.25, "share"),
        (64, 64, "entries"),
        ("4MB", 4e6, "bytes"),
        ("1.5 GiB", 1.5 * 2**30, "bytes"),
        ("5ms", 0.005, "seconds"),
    ],
)
def test_amounts_read_as_they_are_written(given, value, unit):
    amount = Amount.of(given)
    assert amount.value == pytest.approx(value) and amount.unit == unit
    assert Amount.of(str(amount).replace(" entries", "")) if unit != "entries" else True


@pytest.mark.parametrize("given", [0, -3, 1.5, float("nan"), True, "", "4 lightyears", "200%", None, [1]])
def test_what_is_no_amount_is_refused(given):
    with pytest.raises(SpecError, match="allowed"):
        Amount.of(given)


def test_the_package_names_the_comparison():
    assert vestige.compare is compare


@pytest.mark.slow
def test_on_ray_a_worker_is_killed_in_the_middle_and_nothing_is_lost(toy_folder, tmp_path):
    """Two workers; the driver's ledger is watched, and when it has its first rows one of the workers is killed."""
    ray = pytest.importorskip("ray")
    import threading

    settings = SMALL | {"methods": ["h2o", "snapkv"], "budgets": 0.5, "seeds": list(range(12))}
    expected = compare(models=str(toy_folder), out=tmp_path / "local", progress=False, device="cpu", **settings)
    killed: list[int] = []

    def kill_one() -> None:
        import psutil

        ledger, end = tmp_path / "ray" / "ledger.jsonl", time.monotonic() + 300
        while time.monotonic() < end and not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "_Actor" in "".join(p.cmdline())]
        killed.append(workers[0].pid)
        workers[0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    found = compare(
        models=str(toy_folder), out=tmp_path / "ray", progress=False, device="cpu", engine="ray", workers=2, **settings
    )
    thread.join(timeout=60)
    assert killed and not ray.is_initialized()
    rows = list(found.ledger.rows())
    assert not found.failed and len(rows) == len({row["key"] for row in rows}) == found.estimate.cells
    values = {row["key"]: row["scored"]["values"] for row in rows}
    assert values == {row["key"]: row["scored"]["values"] for row in expected.rows}
