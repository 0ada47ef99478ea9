"""Checks for what works on weights, by family: learners here, and each other family in a module of its own.

The families' suites stand in modules beside this one, which the room's name finds through this module.
"""

from __future__ import annotations

import importlib
import pkgutil

FAMILIES = ("learners", "erasers")

for _found in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
    if _found.name in FAMILIES:
        importlib.import_module(f"{__package__}.{_found.name}")
