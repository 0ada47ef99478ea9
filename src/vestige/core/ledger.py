"""The measurement record: one line of JSON for each measurement, in a file that only grows.

Several processes may append to one ledger while others read it. A process killed while it writes can
leave a broken last line; the next append closes that off, reading skips and counts it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.environment import commit, hardware, versions
from vestige.core.method import Method, did_you_mean
from vestige.core.packages import need
from vestige.errors import LedgerError, LedgerVersionError

try:
    import fcntl
except ImportError:  # not on Windows, where only one process may write at a time
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas

__all__ = ["Ledger"]

SCHEMA = 1

# Added to every row by the ledger itself.
FACTS = ("schema", "time", "versions", "hardware", "commit")
BYTES = ("kv_bytes", "state_bytes", "store_bytes", "replay_bytes", "optimizer_bytes", "activation_bytes")
AMOUNTS = (*BYTES, "seconds", "flops")

# JSON has no numbers for these, so they are written as text.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Ledger:
    """A file of measurements.

    Args:
        path: the file; it is made, with its folder, by the first append.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise LedgerError(f"the ledger {self.path} is a folder; allowed: a file")
        self._seen = _Seen()

    def append(self, row: Mapping[str, Any] | None = None, *, key: Any = None, **columns: Any) -> dict[str, Any]:
        """Add one measurement, given as a mapping, by keywords, or both; returned as it reads back.

        Columns with a meaning (all may be left out):

        - ``method``, ``task``: a name, a spec, or the object; stored as a spec (``{"name": …, …}``)
        - ``model``: its name; ``seed``: an integer, or several
        - ``metrics``: names to numbers, or to further such mappings
        - ``kv_bytes``, ``state_bytes``, ``store_bytes``, ``replay_bytes``, ``optimizer_bytes``, ``activation_bytes``:
          bytes that were held; ``seconds``; ``flops``

        Others are stored as they are. The ledger adds ``schema``, ``time`` (UTC), ``versions``, ``hardware`` and
        ``commit``.

        Args:
            key: what this measurement is, as any JSON value (it may also stand in the mapping); a second row with an
                equal key is refused, so that an interrupted run can be taken up again (see :meth:`has`).

        Raises:
            LedgerError: a column's value cannot be recorded, the key is there already, or the file cannot be
                written; nothing has been added then.
        """
        columns = {**(row or {}), **columns}
        key = columns.pop("key", None) if key is None else key
        line = json.dumps(_complete(columns, key), ensure_ascii=False, allow_nan=False)
        with self._locked(os.O_RDWR | os.O_APPEND | os.O_CREAT, exclusive=True) as file:
            size = os.fstat(file).st_size
            if key is not None:
                self._seen.read(file, size)
                if _canonical(key) in self._seen.keys:
                    raise LedgerError(f"{self.path} already has a row with the key {key!r}")
            unfinished = size > 0 and _read(file, size - 1, size) != b"\n"
            self._write(file, size, (b"\n" if unfinished else b"") + line.encode() + b"\n")
        return _decode(line)

    def has(self, key: Any) -> bool:
        """Whether a row with this key is there."""
        if not self.path.exists():
            return False
        with self._locked(os.O_RDONLY) as file:
            self._seen.read(file, os.fstat(file).st_size)
        return _canonical(key) in self._seen.keys

    def rows(self) -> Iterator[dict[str, Any]]:
        """The measurements that are there now, in the order in which they were added.

        Raises:
            LedgerError: the file cannot be read.
            LedgerVersionError: a row was written by a newer Vestige.
        """
        for piece in self._pieces():
            row = _parse(piece)
            if row is None:
                continue
            if row.get("schema", SCHEMA) > SCHEMA:
                raise LedgerVersionError(
                    f"{self.path} was written by a newer Vestige (schema {row['schema']}); upgrade to read it"
                )
            yield row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows()

    def __len__(self) -> int:
        return sum(1 for _ in self.rows())

    @property
    def broken(self) -> int:
        """How many lines cannot be read, left by processes that were killed while they wrote."""
        return sum(1 for piece in self._pieces() if _parse(piece) is None)

    def frame(self) -> pandas.DataFrame:
        """All rows as a table; what is nested becomes dotted columns: ``method.name``, ``metrics.accuracy`` ...

        The columns for bytes, seconds, flops, seed, model, key and commit are always there.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        need("Ledger.frame()", "report", "pandas")
        import pandas

        rows = list(self.rows())
        table = pandas.json_normalize(rows)
        always = ("time", "key", "method.name", "model", "task.name", "seed", *AMOUNTS, "commit")
        table = table.reindex(columns=[*table.columns, *(name for name in always if name not in table.columns)])
        table["time"] = pandas.to_datetime(table["time"], utc=True)
        # Missing values would make whole numbers floats, which lose the last digits of many bytes.
        several = any(isinstance(row["seed"], list) for row in rows)
        for name in BYTES if several else (*BYTES, "seed"):
            table[name] = pandas.array([row.get(name) for row in rows], dtype="Int64")
        return table.astype({"seconds": "Float64", "flops": "Float64"})

    def _pieces(self) -> Iterator[bytes]:
        """The non-empty lines of the file as it is now."""
        if not self.path.exists():
            return
        with self._locked(os.O_RDONLY) as file:
            size = os.fstat(file).st_size
        # What was there under the lock never changes, so reading on needs none.
        with self.path.open("rb") as stream:
            while size > 0 and (line := stream.readline(size)):
                size -= len(line)
                if line.strip():
                    yield line

    def _write(self, file: int, size: int, data: bytes) -> None:
        """One write of one line; what a full disk leaves of it is cut off again."""
        try:
            written = os.write(file, data)
            if written < len(data):
                os.write(file, data[written:])  # gives the reason as an OSError
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, size)
            raise LedgerError(f"{self.path} cannot be written: {error.strerror}") from error

    @contextmanager
    def _locked(self, flags: int, exclusive: bool = False) -> Iterator[int]:
        try:
            if flags & os.O_CREAT:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be opened: {error.strerror}") from error
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
                except OSError as error:
                    if exclusive:  # a file system without locks can still be read
                        raise LedgerError(f"{self.path} cannot be locked: {error.strerror}") from error
            yield file
        finally:
            os.close(file)  # which also unlocks


class _Seen:
    """The keys of a ledger, as far as it has been read."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self._end = 0
        self._last = b""  # the line that ends there

    def read(self, file: int, size: int) -> None:
        """Take in what other processes have added."""
        if size < self._end or _read(file, self._end - len(self._last), self._end) != self._last:
            self.keys, self._end, self._last = set(), 0, b""  # somebody has put another file there
        *whole, rest = _read(file, self._end, size).split(b"\n")
        for piece in (*whole, rest):
            row = _parse(piece)
            if row is not None and row.get("key") is not None:
                self.keys.add(_canonical(row["key"]))
        if whole:
            self._end = size - len(rest)
            self._last = whole[-1] + b"\n"


def _read(file: int, start: int, end: int) -> bytes:
    """The bytes of a file between two places; a single read may give fewer."""
    os.lseek(file, start, os.SEEK_SET)
    pieces = []
    while start < end and (piece := os.read(file, end - start)):
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


def _canonical(key: Any) -> str:
    return json.dumps(_plain(key, "key"), sort_keys=True)


def _parse(piece: bytes) -> dict[str, Any] | None:
    """A row, or None if the line is broken."""
    try:
        row = _decode(piece.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("schema", SCHEMA)) is int else None


def _decode(line: str) -> Any:
    row = json.loads(line)
    if isinstance(row, dict) and "metrics" in row:
        row["metrics"] = _numbers(row["metrics"])
    return row


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _complete(columns: dict[str, Any], key: Any) -> dict[str, Any]:
    """A row in the order in which it is stored, checked and as plain JSON types.

    Raises:
        LedgerError: naming the column, the value and what is allowed.
    """
    for name in columns:
        if name in FACTS:
            raise LedgerError(f"column {name!r} is written by the ledger itself")
        if name.endswith("_bytes") and name not in BYTES:
            raise LedgerError(f"unknown column {name!r}; {did_you_mean(name, BYTES)}")
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **({} if key is None else {"key": _plain(key, "key")}),
        "seed": None,
    }
    row.update((name, _plain(value, name)) for name, value in columns.items())
    for name in ("method", "task"):
        if isinstance(row.get(name), str):
            row[name] = {"name": row[name]}
    _check(row)
    return {**row, "versions": versions(), "hardware": hardware(), "commit": commit()}


def _check(row: dict[str, Any]) -> None:
    allowed = {
        "method": (dict, "a method, its name or its spec"),
        "task": (dict, "a task, its name or its spec"),
        "model": (str, "a name"),
        "seed": (int | list, "an integer, or several"),
        "metrics": (dict, "a mapping of names to numbers"),
        **dict.fromkeys(BYTES, (int, "a whole number of bytes, not negative")),
        **dict.fromkeys(("seconds", "flops"), (int | float, "a finite number, not negative")),
    }
    for name, (kind, text) in allowed.items():
        value = row.get(name)
        if value is None:
            continue
        wrong = not isinstance(value, kind) or isinstance(value, bool)
        if wrong or (name in AMOUNTS and value < 0):
            raise LedgerError(f"column {name!r} is {value!r}; allowed: {text}")


def _plain(value: Any, column: str) -> Any:
    """A value as JSON types.

    Raises:
        LedgerError: it has no such form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value).replace("nan", "NaN").replace("inf", "Infinity")
    if isinstance(value, Method):
        return value.spec()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{column}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [_plain(inner, f"{column}[{place}]") for place, inner in enumerate(items)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _plain({"name": type(value).__name__.lower(), **fields}, column)
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return _plain(value.tolist(), column)
    if type(value).__module__.partition(".")[0] == "torch":  # a dtype or a device
        return str(value).removeprefix("torch.")
    raise LedgerError(f"column {column!r} is a {type(value).__name__}; allowed: what JSON can hold, methods, arrays")
