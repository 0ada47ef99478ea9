"""Linear attention as conditioning (Qiao 2025, arXiv 2508.08289), one association after the other.

A pair of a key and a value is stored by adding ``v k^T`` (Hebb), or ``(v - S k) k^T`` (the delta rule with rate 1);
a query *q* reads ``S q``. With *N* random unit keys of *d* dimensions a read of a stored pair has the expected squared
error ``(N - 1) / d``. Where *H* heads hold the same pairs under keys of their own and *L* layers follow each other,
every layer multiplies the squared length of what is read by ``1 + (N - 1) / (d H)``, of which 1 is the pair itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SMALL", "capacity", "certain", "delta", "error_after", "examples", "exponent", "hebb", "interference"]

# A run of a second.
SMALL = {"widths": (16, 32), "loads": (0.25, 1.0), "trials": 4, "layers": 2, "heads": (1, 2), "width": 16}


def interference(associations: int, width: int) -> float:
    """Each of the others overlaps with the query by a random number of variance ``1 / d``."""
    return sum(1 / width for _ in range(1, associations))


def error_after(associations: int, width: int, heads: int, layers: int) -> float:
    """Layer by layer."""
    length = 1.0
    for _ in range(layers):
        length += length * sum(1 / (width * heads) for _ in range(1, associations))
    return length - 1


def capacity(counts: Sequence[int], errors: Sequence[float], tolerated: float) -> float:
    """Where the broken line through the points reaches what is tolerated."""
    return float(np.interp(tolerated, errors, counts))


def exponent(widths: Sequence[float], held: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms."""
    return float(np.polyfit(np.log(widths), np.log(held), 1)[0])


def certain(keys: np.ndarray) -> float:
    """Associations that fit until overlaps with the first key add up to one."""
    total, number = 0.0, 1
    for other in keys[1:]:
        total += abs(math.fsum(a * b for a, b in zip(keys[0], other, strict=True)))
        if total >= 1:
            break
        number += 1
    return float(number)


def hebb(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What every key reads when all pairs are stored."""
    store = np.zeros((values.shape[1], keys.shape[1]))
    for key, value in zip(keys, values, strict=True):
        store += np.outer(value, key)
    return np.stack([store @ key for key in keys])


def delta(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same, where only what is not yet known is stored."""
    store = np.zeros((values.shape[1], keys.shape[1]))
    for key, value in zip(keys, values, strict=True):
        store += np.outer(value - store @ key, key)
    return np.stack([store @ key for key in keys])


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the formulas with."""
    keys = chance.normal(size=(70, 12))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values = chance.normal(size=(70, 5))
    n, d = int(chance.integers(2, 40)), int(chance.integers(4, 64))
    rising = np.cumsum(chance.random(6) + 0.1).tolist()
    widths = [4.0, 9.0, 31.0, 80.0]
    return {
        "interference": {"associations": n, "width": d},
        "error_after": {"associations": n, "width": d, "heads": 3, "layers": 5},
        "capacity": {"counts": [1, 4, 5, 9, 20, 21], "errors": rising, "tolerated": float(np.mean(rising))},
        "exponent": {"widths": widths, "held": (1 + 50 * chance.random(4)).tolist()},
        "certain": {"keys": keys},
        "hebb": {"keys": keys, "values": values},
        "delta": {"keys": keys, "values": values},
    }
