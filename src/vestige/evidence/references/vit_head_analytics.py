"""What Li et al. 2023 (arXiv 2303.13731) look at in a vision transformer's heads, one head and one patch at a time.

Importance (section 4). The output of one head is set to zero. With p the classes' probabilities of the whole model
and q those of the pruned one, m = (p + q) / 2:

    JSD(p, q) = sum of p log2(p / m) / 2 + sum of q log2(q / m) / 2.

Strength (section 5). Patches i and j of a grid are hops(i, j) = max(|rows apart|, |columns apart|) from each other. The
strength at k hops is the mean over i of the sum of A[i, j] over the patches j that are k hops from i.

Patterns (section 6) are learnt by an autoencoder; the maps that it is given are written out here: the mean of A[i, j]
over all pairs that are the same step apart, and the mean over i of A[i, j].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["SMALL", "divergence", "hop_profile", "landing_map", "mean_distance", "offset_map"]

# Hyper-parameters with which the probe runs on a few images of a small model.
SMALL = {"kinds": 2, "code": 2, "steps": 5, "sorted_images": 4, "batch": 3}


def divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """JSD(p, q), with 0 log 0 = 0."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += sum(c * math.log2(c / m) / 2 for c in (a, b) if c > 0)
    return total


def _place(patch: int, columns: int) -> tuple[int, int]:
    return divmod(patch, columns)


def hop_profile(attention: np.ndarray, rows: int, columns: int) -> list[float]:
    """The strength at 0, 1, 2 ... hops."""
    found = [0.0] * max(rows, columns)
    for i in range(rows * columns):
        for j in range(rows * columns):
            (a, b), (c, d) = _place(i, columns), _place(j, columns)
            found[max(abs(a - c), abs(b - d))] += attention[i, j] / (rows * columns)
    return found


def mean_distance(attention: np.ndarray, rows: int, columns: int) -> float:
    """Mean over the patches of the distance to what they look at, weighted by their attention to patches."""
    total = 0.0
    for i in range(rows * columns):
        row = attention[i] / attention[i].sum()
        for j in range(rows * columns):
            total += row[j] * math.dist(_place(i, columns), _place(j, columns)) / (rows * columns)
    return total


def offset_map(attention: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mean attention by step; no step is in the middle."""
    found = np.zeros((2 * rows - 1, 2 * columns - 1))
    for down in range(1 - rows, rows):
        for across in range(1 - columns, columns):
            pairs = []
            for i in range(rows * columns):
                a, b = _place(i, columns)
                if 0 <= a + down < rows and 0 <= b + across < columns:
                    pairs.append(attention[i, (a + down) * columns + b + across])
            found[down + rows - 1, across + columns - 1] = sum(pairs) / len(pairs)
    return found


def landing_map(attention: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mean attention that each patch receives."""
    return np.array([[attention[:, r * columns + c].mean() for c in range(columns)] for r in range(rows)])
