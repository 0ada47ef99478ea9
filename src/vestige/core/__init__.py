"""The contract: methods and their registry, undoable patches, one view of any model, the ledger.

What needs torch is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vestige.core.method import Method, Paper, Verdict, param
from vestige.core.registry import MethodCard, method, methods, registry

if TYPE_CHECKING:
    from vestige.core.anatomy import Anatomy, Architecture, Layer
    from vestige.core.ledger import Ledger
    from vestige.core.patch import Patch
    from vestige.core.projection import Projection

_LATER = {
    "Anatomy": "vestige.core.anatomy",
    "Architecture": "vestige.core.anatomy",
    "Layer": "vestige.core.anatomy",
    "Ledger": "vestige.core.ledger",
    "Patch": "vestige.core.patch",
    "Projection": "vestige.core.projection",
}

__all__ = [
    "Anatomy",
    "Architecture",
    "Layer",
    "Ledger",
    "Method",
    "MethodCard",
    "Paper",
    "Patch",
    "Projection",
    "Verdict",
    "method",
    "methods",
    "param",
    "registry",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'vestige.core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
