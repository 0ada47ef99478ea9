"""Find what belongs to a method by the method's name."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType

__all__ = ["module_name", "module_of"]


def module_name(slug: str) -> str:
    """The file name that goes with a method's name: ``"streaming-llm"`` is ``streaming_llm``."""
    name = slug.replace("-", "_").replace("+", "_plus").replace(".", "_")
    return name if name.isidentifier() else f"_{name}"


def module_of(package: str, slug: str, entry_points: str) -> ModuleType | None:
    """The module of a package that is named after a method, or ``None``.

    Third parties bring theirs through an entry point group, under the method's name.
    """
    place = f"{package}.{module_name(slug)}"
    if importlib.util.find_spec(place) is not None:
        return importlib.import_module(place)
    for entry in metadata.entry_points(group=entry_points, name=slug):
        return entry.load()
    return None
