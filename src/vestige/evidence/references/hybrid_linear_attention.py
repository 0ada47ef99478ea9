"""What the study of hybrid linear attention (arXiv 2507.06457) computes, written out.

A ratio of *r* to 1 over *L* layers asks for the whole number nearest to *L / (r + 1)* of layers of full attention, one
at least; they end equal parts of the stack. Stability is the largest loss over the smallest, less 1. The lead of what
is best alone is its distance to the mean of the others; what is left of it is that distance in hybrids, over the first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["SMALL", "examples", "full_places", "kept_lead", "spread"]

# A run of a second or two.
SMALL = {
    "mixers": ("gla", "gated-delta-net"),
    "hidden": 32,
    "heads": 1,
    "length": 12,
    "pairs": 2,
    "keys": 4,
    "rows": 2,
    "steps": 2,
    "asked": 6,
    "workers": 1,
}


def full_places(layers: int, ratio: int) -> list[float]:
    """Walk through the parts; the last layer of each is full."""
    count = max(1, int(np.rint(layers / (ratio + 1))))
    full = [0.0] * layers
    for part in range(1, count + 1):
        full[int(np.rint(part * layers / count)) - 1] = 1.0
    return full


def spread(losses: np.ndarray) -> float:
    """Sort."""
    ordered = sorted(losses)
    return (ordered[-1] - ordered[0]) / ordered[0]


def kept_lead(alone: np.ndarray, mixed: np.ndarray) -> float:
    """Distances to the mean of the others."""
    best = max(range(len(alone)), key=lambda place: alone[place])

    def lead(values: np.ndarray) -> float:
        return values[best] - math.fsum(v for place, v in enumerate(values) if place != best) / (len(values) - 1)

    return lead(mixed) / lead(alone)


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the formulas with."""
    return {
        "full_places": {"layers": int(chance.integers(2, 30)), "ratio": int(chance.integers(1, 13))},
        "spread": {"losses": 1 + chance.random(5)},
        "kept_lead": {"alone": chance.random(4), "mixed": chance.random(4)},
    }
