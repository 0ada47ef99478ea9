"""Slow, readable implementations of the papers' equations in float64.

The module ``vestige.evidence.references.<slug>`` (third parties: the entry point group ``vestige.references``)
holds the reference of one method. It is written to be read beside the paper: no batching, no caching, no
numerical device that the equations do not need. The functions that it must offer are fixed by the family:

- cache policies (room ``context``): ``simulate(query, key, value, chunks, ..., **hyper-parameters) -> Trace``;
  see :mod:`vestige.evidence.references.caching`. One whose layers depend on one another names the arguments
  ``layer``, ``layers`` (their number) and ``below`` (the traces of the layers so far, by layer). ``SMALL`` there holds
  hyper-parameters for which the method has something to do on prompts of a few dozen tokens, where its own would not.
- mixers and channel mixers (room ``layers``): ``mix(x, weights, place, **hyper-parameters) -> y``;
  see :mod:`vestige.evidence.references.mixing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vestige.evidence.slugs import module_of

__all__ = ["asked_of", "reference_of"]

ENTRY_POINTS = "vestige.references"


def reference_of(name: str) -> ModuleType | None:
    """The reference module of a method, or ``None`` where there is none."""
    return module_of(__name__, name, ENTRY_POINTS)


def asked_of(function: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """Of what is known, that for which a function has a parameter by name (and does not only pass on)."""
    parameters = inspect.signature(function).parameters
    return {k: v for k, v in known.items() if k in parameters and parameters[k].kind != inspect.Parameter.VAR_KEYWORD}
