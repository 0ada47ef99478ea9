"""Models: any Hugging Face id or folder, and one that needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.models.hub import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from vestige.models.hub import load

        return load
    raise AttributeError(f"module 'vestige.models' has no attribute {name!r}")
