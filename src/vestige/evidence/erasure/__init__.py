"""What remains of examples in a model that was made to forget them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.evidence.erasure.audit import audit_erasure
    from vestige.evidence.erasure.relearn import Relearning
    from vestige.evidence.erasure.result import ErasureAudit

_LATER = {"ErasureAudit": "result", "Relearning": "relearn", "audit_erasure": "audit"}

__all__ = ["ErasureAudit", "Relearning", "audit_erasure"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
