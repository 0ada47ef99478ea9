"""Measuring what remains: tasks, probes, studies, references, claims, certificates, audits and reports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.evidence.erasure.audit import audit_erasure

_LATER = {"audit_erasure": "erasure.audit"}

__all__ = ["audit_erasure"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
