"""Make a model forget some of what it was trained on, and be able to take that back.

>>> trace = SSD().erase(model, forget=forget, retain=retain)
>>> trace.undo()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.weights.erase.eraser import Eraser, Trace

_LATER = {"Eraser": "eraser", "Trace": "eraser"}

__all__ = ["Eraser", "Trace"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
