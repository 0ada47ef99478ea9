"""What benchmarks share: where and with what they ran, rows that are kept as they come, and time that is limited."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vestige.core.files import write_whole

__all__ = ["Clock", "Sheet", "here", "keep", "known", "short"]


class Clock:
    """Says when the minutes that a script was given are over; what is done is kept, and another call goes on."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


class Sheet:
    """Rows of a result, written as they come; what is there of an earlier call is not measured again."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head, self.rows = path, head, known(path)
        if path.is_file():
            device = json.loads(path.read_text())["device"]
            if device != head["device"]:
                raise SystemExit(f"{path} is of {device}; this is {head['device']}: give another --out")

    def has(self, **which: Any) -> bool:
        """Whether there is a row of such entries."""
        return any(all(row.get(key) == value for key, value in which.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """One more row, printed and kept."""
        self.rows.append(short(row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep(self.path, {**self.head, "rows": self.rows})
        print(json.dumps(self.rows[-1]), flush=True)


def here(device: str, *packages: str) -> dict[str, Any]:
    """Hardware and versions, for a result."""
    count = torch.get_num_threads()
    threads = f"{count} CPU thread{'s' if count > 1 else ''}"
    versions = {}
    for name in ("torch", "transformers", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "packages": versions,
    }


def known(path: Path) -> list[dict[str, Any]]:
    """The rows of a result that was begun; none where there is none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all: one row of ``rows`` a line."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    write_whole(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def short(value: Any) -> Any:
    """Numbers with four digits, for files that people read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return [short(each) for each in value] if isinstance(value, list) else value
