"""Vestige: decide what a transformer keeps, and prove what remains.

Importing the package imports neither torch nor transformers; each door loads what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vestige.core.method import Method, Paper, Verdict, param
    from vestige.core.registry import MethodCard, method, methods
    from vestige.evidence.audit import audit
    from vestige.evidence.compare import compare
    from vestige.evidence.tasks.registry import task, tasks

# Name in this namespace, and the module that holds it.
_DOORS = {
    "Method": "vestige.core.method",
    "MethodCard": "vestige.core.registry",
    "Paper": "vestige.core.method",
    "Verdict": "vestige.core.method",
    "audit": "vestige.evidence.audit",
    "compare": "vestige.evidence.compare",
    "method": "vestige.core.registry",
    "methods": "vestige.core.registry",
    "param": "vestige.core.method",
    "task": "vestige.evidence.tasks.registry",
    "tasks": "vestige.evidence.tasks.registry",
}
_ROOMS = ("context", "core", "errors", "evidence", "layers", "models", "stores", "training", "weights")

__all__ = [
    "Method",
    "MethodCard",
    "Paper",
    "Verdict",
    "__version__",
    "audit",
    "compare",
    "method",
    "methods",
    "param",
    "task",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"vestige.{name}")
    raise AttributeError(f"module 'vestige' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOORS, *_ROOMS})
