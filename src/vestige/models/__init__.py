"""Models: any Hugging Face id or folder, one that needs no network, and one whose blocks are named in its config."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige.models.config import VestigeConfig
    from vestige.models.hub import load
    from vestige.models.lm import VestigeLM, VestigeModel
    from vestige.models.state import VestigeState

# Name in this namespace, and the module that holds it.
_DOORS = {
    "VestigeConfig": "vestige.models.lm",  # importing the model is what registers the config with transformers
    "VestigeLM": "vestige.models.lm",
    "VestigeModel": "vestige.models.lm",
    "VestigeState": "vestige.models.state",
    "load": "vestige.models.hub",
}

__all__ = ["VestigeConfig", "VestigeLM", "VestigeModel", "VestigeState", "load"]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'vestige.models' has no attribute {name!r}")
