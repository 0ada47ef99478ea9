"""Files that are written whole or not at all, and descriptions that are read from them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from vestige.core.spec import did_you_mean
from vestige.errors import InputError, SpecError

__all__ = ["drafted", "folder_for", "read_description", "write_whole"]

T = TypeVar("T", bound=pydantic.BaseModel)


@contextmanager
def drafted(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside the one that is meant, which takes its place when the block ends; that one stays until then.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)  # a file made as a temporary one is its owner's alone
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file whole or not at all: what stood there before stays until the new one is complete.

    Returns:
        The file's path.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with drafted(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def folder_for(out: str | os.PathLike[str]) -> Path:
    """A folder that results are to go to, which need not be there yet.

    Raises:
        InputError: it is a file.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out is {str(out)!r}, which is no folder")
    return folder


def read_description(
    kind: type[T], source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any
) -> tuple[T, Path]:
    """Settings from a YAML file or a mapping, with changes (those that are ``None`` change nothing).

    Returns:
        The settings, and the folder that relative paths in them are relative to.

    Raises:
        InputError: no such file, or no text.
        SpecError: no YAML, an unknown field, or a value that is not allowed; names field and value.
    """
    import yaml

    base = Path()
    if isinstance(source, Mapping):
        given: Any = dict(source)
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{os.fspath(source)!r} cannot be read: {error}") from error
        try:
            given = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"{os.fspath(source)!r} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise SpecError(f"{os.fspath(source)!r} holds no fields; allowed: {', '.join(kind.model_fields)}")
        base = Path(source).resolve().parent
    given.update({name: value for name, value in changes.items() if value is not None})
    try:
        return kind(**given), base
    except pydantic.ValidationError as error:
        raise SpecError(_first(error, kind)) from None


def _first(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner: Any = kind
        for part in first["loc"][:-1]:
            held = owner.model_fields[part].annotation
            owner = next((a for a in getattr(held, "__args__", (held,)) if hasattr(a, "model_fields")), owner)
        return f"unknown field {place!r}; {did_you_mean(str(first['loc'][-1]), owner.model_fields)}"
    shown = "missing" if first["type"] == "missing" else repr(first["input"])
    return f"field {place!r} is {shown}: {first['msg']}" if place else str(first["msg"])
