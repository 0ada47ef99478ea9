"""Ledger: every measurement is there once and whole, whatever happens to the processes that write."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

import vestige
from vestige.core import Ledger, Method, environment
from vestige.errors import LedgerError, MissingPackageError


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "runs" / "ledger.jsonl")


@dataclass(frozen=True)
class Needle:
    length: int
    depth: float


def test_a_row_carries_what_was_measured_and_with_what(ledger, samples):
    before = datetime.now(UTC) - timedelta(seconds=1)
    row = ledger.append(
        {"method": samples.Plain(needed=8), "model": "tiny"},
        task=Needle(length=100, depth=0.5),
        seed=3,
        metrics={"accuracy": np.float32(0.5), "by layer": {"0": torch.tensor([1, 2])}},
        kv_bytes=np.int64(2**60 + 1),
        seconds=1.5,
        dtype=torch.bfloat16,
        where=Path("a/b"),
    )
    assert [row] == list(ledger.rows()) == list(ledger)
    assert row["method"] == samples.Plain(needed=8).spec()
    assert Method.from_spec(row["method"]) == samples.Plain(needed=8)
    assert row["task"] == {"name": "needle", "length": 100, "depth": 0.5}
    assert row["metrics"] == {"accuracy": 0.5, "by layer": {"0": [1, 2]}}
    assert (row["seed"], row["kv_bytes"], row["dtype"], row["where"]) == (3, 2**60 + 1, "bfloat16", "a/b")
    assert before <= datetime.fromisoformat(row["time"]) <= datetime.now(UTC)
    assert row["schema"] == 1
    assert row["versions"]["vestige"] == vestige.__version__
    assert row["versions"]["torch"] == torch.__version__
    assert row["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert row["hardware"]["cores"] >= 1 and row["hardware"]["memory_bytes"] > 2**20 and row["hardware"]["cpu"]
    assert (row["hardware"]["gpu"] is not None) == torch.cuda.is_initialized()
    assert "commit" in row and not any(os.uname().nodename in str(value) for value in row.values())


def test_names_stand_for_specs_and_seed_is_always_there(ledger):
    row = ledger.append(method="full", task="needle")
    assert row["method"] == {"name": "full"} and row["task"] == {"name": "needle"} and row["seed"] is None


def test_numbers_that_json_has_not_come_back(ledger):
    row = ledger.append(metrics={"loss": math.nan, "perplexity": [math.inf, -math.inf]})
    assert math.isnan(row["metrics"]["loss"]) and row["metrics"]["perplexity"] == [math.inf, -math.inf]
    assert "NaN" in ledger.path.read_text()
    json.loads(ledger.path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"time": "now"}, "'time' is written by the ledger"),
        ({"kv_byte_bytes": 3}, "unknown column 'kv_byte_bytes'; did you mean kv_bytes"),
        ({"kv_bytes": -1}, "'kv_bytes' is -1"),
        ({"kv_bytes": 1.5}, "'kv_bytes' is 1.5"),
        ({"kv_bytes": True}, "'kv_bytes' is True"),
        ({"seconds": math.inf}, "'seconds' is 'Infinity'"),
        ({"seconds": "long"}, "'seconds' is 'long'"),
        ({"seed": 1.0}, "'seed' is 1.0"),
        ({"model": 3}, "'model' is 3"),
        ({"metrics": 0.5}, "'metrics' is 0.5"),
        ({"metrics": {"a": [1, object()]}}, r"'metrics\.a\[1\]' is a object"),
        ({"key": object()}, "'key' is a object"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(ledger, columns, text):
    with pytest.raises(LedgerError, match=text):
        ledger.append(columns)
    assert not ledger.path.exists()


def test_a_key_is_there_once(ledger, samples):
    other = Ledger(ledger.path)  # another process, as it were
    assert not ledger.has("a")
    ledger.append(key="a", seed=1)
    assert ledger.has("a") and other.has("a") and not other.has("b")
    for twin in (ledger, other, Ledger(ledger.path)):
        with pytest.raises(LedgerError, match="already has a row with the key 'a'"):
            twin.append({"key": "a"}, seed=2)
    other.append({"key": {"seed": 1, "method": samples.Plain(needed=4)}})
    assert ledger.has({"method": samples.Plain(needed=4), "seed": 1})
    assert not ledger.has({"method": samples.Plain(needed=5), "seed": 1})
    ledger.append(seed=1)
    ledger.append(seed=1)  # without a key, a row may be repeated
    assert len(ledger) == 4
    assert [row.get("key") for row in other][:1] == ["a"]


def test_keys_follow_the_file_when_it_is_replaced(ledger):
    ledger.append(key="a")
    ledger.append(key="b")
    ledger.path.unlink()
    assert not ledger.has("a")
    Ledger(ledger.path).append(key="c")
    assert ledger.has("c") and not ledger.has("b")
    ledger.path.write_text("")
    assert not ledger.has("c")


@pytest.mark.parametrize("cut", [1, 2, 20, -3, -2])
def test_a_broken_tail_is_skipped_counted_and_closed_off(ledger, cut):
    ledger.append(key="a")
    ledger.append(key="b")
    whole = ledger.path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    ledger.path.write_bytes(first + second[:cut])
    twin = Ledger(ledger.path)
    assert [row["key"] for row in twin] == ["a"] and twin.broken == 1 and not twin.has("b")
    twin.append(key="b")
    twin.append(key="c")
    assert [row["key"] for row in ledger] == ["a", "b", "c"] and ledger.broken == 1
    assert ledger.has("b")


def test_a_row_that_lacks_only_its_newline_counts(ledger):
    ledger.append(key="a")
    ledger.path.write_bytes(ledger.path.read_bytes().rstrip(b"\n"))
    twin = Ledger(ledger.path)
    assert twin.has("a") and len(twin) == 1 and twin.broken == 0
    with pytest.raises(LedgerError, match="already"):
        twin.append(key="a")
    twin.append(key="b")
    assert [row["key"] for row in twin] == ["a", "b"] and twin.broken == 0


def test_lines_that_are_no_rows_are_broken(ledger):
    ledger.append(key="a")
    with ledger.path.open("ab") as stream:
        stream.write(b'[1, 2]\n\n"text"\n\xff\xfe\n{"key": \n')
    assert [row["key"] for row in ledger] == ["a"]
    assert ledger.broken == 4


def test_a_row_of_a_newer_vestige_is_not_misread(ledger):
    ledger.append(key="a")
    ledger.path.write_text(ledger.path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(LedgerError, match="newer Vestige"):
        list(ledger)


WRITER = """
import sys
from vestige.core import Ledger
ledger = Ledger(sys.argv[1])
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    ledger.append(key=f"{sys.argv[2]}-{number}", seed=number, metrics={"text": "x" * 5000})
"""


def writer(ledger: Ledger, name: str, rows: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(ledger.path), name, str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_writer_leaves_a_ledger_that_goes_on(ledger):
    for attempt in range(3):
        process = writer(ledger, f"run{attempt}", 10**6)
        deadline = time.monotonic() + 30
        start = len(ledger)
        while len(ledger) < start + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        keys = [row["key"] for row in ledger]
        assert len(keys) >= start + 5 and len(set(keys)) == len(keys)
        assert ledger.broken <= attempt + 1
        mine = [key for key in keys if key.startswith(f"run{attempt}-")]
        assert mine == [f"run{attempt}-{number}" for number in range(len(mine))]  # none in the middle is lost
        assert ledger.has(mine[-1]) and not ledger.has(f"run{attempt}-{len(mine)}")
        ledger.append(key=f"after {attempt}")
        assert ledger.has(f"after {attempt}")


def test_two_writers_and_a_reader_at_once(ledger):
    writers = [writer(ledger, name, 60) for name in "ab"]
    seen = 0
    while any(process.poll() is None for process in writers):
        rows = list(ledger)
        assert ledger.broken == 0
        assert len(rows) >= seen
        seen = len(rows)
    assert [process.returncode for process in writers] == [0, 0]
    keys = [row["key"] for row in ledger]
    assert sorted(keys) == sorted(f"{name}-{number}" for name in "ab" for number in range(60))
    assert all(len(row["metrics"]["text"]) == 5000 for row in ledger)


CLAIMER = """
import sys
from vestige.core import Ledger
from vestige.errors import LedgerError
ledger = Ledger(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    try:
        ledger.append(key=number)
        print(number)
    except LedgerError as error:
        assert "already" in str(error)
"""


def test_of_two_writers_of_the_same_keys_one_wins_each(ledger):
    command = [sys.executable, "-c", CLAIMER, str(ledger.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    claimers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [claimer.stdout.readline() for claimer in claimers] == ["ready\n"] * 2
    for claimer in claimers:
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    won = [int(number) for claimer in claimers for number in claimer.communicate()[0].split()]
    assert [claimer.returncode for claimer in claimers] == [0, 0]
    assert sorted(won) == sorted(row["key"] for row in ledger) == list(range(50))


def test_a_writer_waits_for_the_lock(ledger):
    ledger.append(key="mine")
    with ledger.path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = writer(ledger, "other", 1)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.5)
        assert len(ledger.path.read_bytes().splitlines()) == 1
    assert other.wait(timeout=60) == 0
    assert [row["key"] for row in ledger] == ["mine", "other-0"]


def test_a_full_disk_leaves_no_half_row(ledger):
    ledger.append(key="a")
    size = ledger.path.stat().st_size
    script = """
import resource, signal, sys
from vestige.core import Ledger
from vestige.errors import LedgerError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]) + 100,) * 2)  # room for part of a row
try:
    Ledger(sys.argv[1]).append(key="b", text="x" * 5000)
except LedgerError as error:
    print("cannot be written" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script, str(ledger.path), str(size)], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert ledger.path.stat().st_size == size
    ledger.append(key="b")
    assert [row["key"] for row in ledger] == ["a", "b"] and ledger.broken == 0


def test_frame(ledger, samples):
    pandas = pytest.importorskip("pandas")
    ledger.append(
        method=samples.Plain(needed=8), task="needle", metrics={"recall": 0.5, "deep": {"low": math.nan}}, seed=1
    )
    ledger.append(method="full", kv_bytes=2**60 + 1, seconds=2, metrics={"recall": 1})
    table = ledger.frame()
    assert list(table["method.name"]) == ["sample-plain", "full"]
    assert list(table["metrics.recall"]) == [0.5, 1.0] and table["metrics.deep.low"].isna().all()
    assert table["method.needed"][0] == 8
    assert table["kv_bytes"][1] == 2**60 + 1 and table["kv_bytes"].isna()[0]
    assert table["seconds"][1] == 2 and table["seed"][0] == 1
    assert {"replay_bytes", "flops", "commit", "model", "key", "versions.torch", "hardware.cpu"} <= set(table.columns)
    assert table["time"].dt.tz is not None
    ledger.append(seed=[1, 2])
    assert ledger.frame()["seed"][2] == [1, 2]
    empty = Ledger(ledger.path.with_name("none.jsonl")).frame()
    assert isinstance(empty, pandas.DataFrame) and len(empty) == 0 and "kv_bytes" in empty.columns


def test_frame_names_the_missing_package(ledger, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'vestige\[report\]'"):
        ledger.frame()


def test_paths_that_cannot_be_used(tmp_path, ledger):
    with pytest.raises(LedgerError, match="is a folder"):
        Ledger(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append()
    assert list(ledger) == [] and ledger.broken == 0 and not ledger.has("a")
    assert not ledger.path.parent.exists()


def test_the_commit_is_that_of_vestige(monkeypatch, tmp_path):
    environment.commit.cache_clear()
    top = Path(vestige.__file__).resolve().parents[2]
    if not (top / ".git").exists():
        pytest.skip("not run from a checkout")
    head = subprocess.run(["git", "-C", top, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment.commit().removesuffix("-dirty") == head
    # Installed in an environment that lies inside somebody else's repository.
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    package = tmp_path / "env" / "vestige"
    package.mkdir(parents=True)
    monkeypatch.setattr(vestige, "__file__", str(package / "__init__.py"))
    environment.commit.cache_clear()
    assert environment.commit() is None
    environment.commit.cache_clear()


def test_the_ledger_needs_no_torch(ledger):
    script = (
        "import sys; from vestige.core import Ledger; Ledger(sys.argv[1]).append(seed=1); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(ledger.path)], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert next(ledger.rows())["hardware"]["gpu"] is None
