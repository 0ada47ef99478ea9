"""What the growth of overshadowing (Zhang et al. 2024, arXiv 2407.08039) is measured with, written out.

The rate R of hallucination is held against the logarithm of the imbalance m, and of the length: R = a + b log2 m.
Anticipation is judged by the area under the ROC curve of the indicator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SMALL", "examples", "log_slope", "separation"]

SMALL = {"ratios": (1, 2), "lengths": (1, 2), "ratio": 2, "length": 1, "subjects": 6, "hidden": 16, "passes": 2}


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the equations with."""
    return {
        "log_slope": {"at": np.array([1.0, 2.0, 4.0, 16.0]), "rates": chance.random(4)},
        "separation": {"low": chance.integers(0, 4, 5).astype(float), "high": chance.integers(1, 6, 7).astype(float)},
    }


def log_slope(at: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Slope b of the least squares line R = a + b log2 m, and Pearson's correlation."""
    xs = [math.log2(value) for value in at]
    x_mean, y_mean = sum(xs) / len(xs), sum(rates) / len(rates)
    both = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, rates, strict=True))
    of_x, of_y = sum((x - x_mean) ** 2 for x in xs), sum((y - y_mean) ** 2 for y in rates)
    return [both / of_x, both / math.sqrt(of_x * of_y)]


def separation(low: Sequence[float], high: Sequence[float]) -> float:
    """Of all pairs, those in order; ties count half."""
    pairs = [(a, b) for a in low for b in high]
    return sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
