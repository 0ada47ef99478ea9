"""The sink metric of Gu et al. 2024 (arXiv 2410.10781), head by head.

With causal weights *A* over *T* tokens, the first token receives the mean of its column, ``sum_i A[i, 1] / T``. A head
counts as a sink where that exceeds the threshold; the metric is the share of heads, layers and texts that do. Weights
that are not normalised are looked at through proxies: each row over its sum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["SMALL", "examples", "proxies", "received", "sigmoid", "sink_rate", "with_first"]

# A run of a second or two.
SMALL = {"length": 12, "texts": 3, "reach": 8, "hidden": 8, "rows": 2, "steps": 5}


def received(weights: np.ndarray) -> np.ndarray:
    """Column by column: what the queries give the first token."""
    return np.array([math.fsum(head[query, 0] for query in range(len(head))) / len(head) for head in weights])


def proxies(weights: np.ndarray) -> np.ndarray:
    """Row by row."""
    return np.array([[row / math.fsum(row) for row in head] for head in weights])


def sink_rate(received: np.ndarray, threshold: float) -> float:
    """Count."""
    return sum(1 for value in received if value > threshold) / len(received)


def with_first(share: float, length: int) -> float:
    """The first query gives the first token all, the others the share on average."""
    return (1.0 + sum(share for _ in range(length - 1))) / length


def sigmoid(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-q k / sqrt(d)))`` over the past, not normalised."""
    weights = np.zeros((len(q), len(k)))
    for t in range(len(q)):
        for s in range(t + 1):
            weights[t, s] = 1 / (1 + math.exp(-(q[t] @ k[s]) / math.sqrt(q.shape[1])))
    return weights


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the formulas with."""
    weights = np.tril(chance.random((5, 9, 9))) + 0.1 * np.eye(9)
    return {
        "received": {"weights": weights},
        "proxies": {"weights": weights},
        "sink_rate": {"received": chance.random(40), "threshold": 0.3},
        "with_first": {"share": float(chance.random()), "length": int(chance.integers(2, 80))},
        "sigmoid": {"q": chance.normal(size=(7, 6)), "k": chance.normal(size=(7, 6))},
    }
