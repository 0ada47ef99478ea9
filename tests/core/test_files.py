"""Files written whole or not at all, and descriptions read from them."""

from __future__ import annotations

import stat
from pathlib import Path

import pydantic
import pytest

from vestige.core.files import read_description, write_whole
from vestige.errors import InputError, SpecError


class Inner(pydantic.BaseModel, extra="forbid"):
    width: int = 2


class Plan(pydantic.BaseModel, extra="forbid"):
    steps: int
    inner: Inner = Inner()


def test_a_file_appears_whole_and_readable(tmp_path: Path) -> None:
    target = write_whole(tmp_path / "deep" / "a.txt", "süß\n")
    assert target.read_bytes() == "süß\n".encode() and stat.S_IMODE(target.stat().st_mode) == 0o644
    assert write_whole(target, b"anew").read_bytes() == b"anew"


def test_what_stood_there_stays_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_whole(tmp_path / "a.txt", "old")

    def fail(self: Path, other: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_file_gives_settings_and_the_folder_that_they_speak_of(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "plan.yaml", "steps: 3\ninner: {width: 5}\n")
    assert read_description(Plan, path, steps=None) == (Plan(steps=3, inner=Inner(width=5)), tmp_path.resolve())
    assert read_description(Plan, {"steps": 1}, steps=4) == (Plan(steps=4), Path())


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"\xff\xfe\x00", InputError, "cannot be read"),
        (b"steps: [", SpecError, "no YAML"),
        (b"- 1\n", SpecError, "holds no fields; allowed: steps, inner"),
        (b"step: 1\nsteps: 1\n", SpecError, "unknown field 'step'; did you mean steps"),
        (b"steps: 1\ninner: {widht: 1}\n", SpecError, "unknown field 'inner.widht'; did you mean width"),
        (b"inner: {}\n", SpecError, "field 'steps' is missing"),
        (b"steps: many\n", SpecError, "field 'steps' is 'many'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read_description(Plan, write_whole(tmp_path / "plan.yaml", content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_description(Plan, tmp_path / "none.yaml")
