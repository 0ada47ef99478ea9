"""Memorisation and influence, one example at a time.

Feldman 2019 (arXiv 1906.05271): an algorithm A memorises example i of the set S by

    mem(A, S, i) = P[h(x_i) = y_i for h of A(S)] - P[h(x_i) = y_i for h of A(S without i)].

Feldman and Zhang 2020 (arXiv 2008.03703): estimated over random parts of S, by those with i and those without; the
influence on a question j is the same with P[h(x_j) = y_j].

Limits: an example's gradient is clipped to a norm, and Gaussian noise is added to the sum. With noise of s norms, T
steps on all examples are rho = T / (2 s^2) zero-concentrated private, hence (epsilon, delta)-private with
epsilon = rho + 2 sqrt(rho log(1 / delta)).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["SMALL", "example_norms", "examples", "influences", "memorisations", "noise_for"]

SMALL = {
    "nets": 20,
    "limited_nets": 20,
    "share": 0.5,
    "repeats": 2,
    "most": 3,
    "asked": 1,
    "hidden": 8,
    "steps": 10,
    "epsilons": (8.0,),
}


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the equations with."""
    chosen = np.array([chance.permutation(9) < 5 for _ in range(6)])
    chosen[0], chosen[1] = True, False  # each example is seen by some networks and not by others
    return {
        "influences": {"right": chance.integers(0, 2, (6, 4)).astype(float), "chosen": chosen},
        "memorisations": {"right": chance.integers(0, 2, (6, 9)).astype(float), "chosen": chosen},
        "example_norms": {
            "x": chance.normal(size=(3, 4)),
            "hidden": chance.normal(size=(3, 5)),
            "back_hidden": chance.normal(size=(3, 5)),
            "back_out": chance.normal(size=(3, 2)),
        },
        "noise_for": {"epsilon": float(chance.uniform(1, 9)), "delta": 1e-3, "steps": 50},
    }


def influences(right: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """infl(i, j) for all examples i and questions j."""
    found = np.zeros((chosen.shape[1], right.shape[1]))
    for i in range(chosen.shape[1]):
        for j in range(right.shape[1]):
            found[i, j] = right[chosen[:, i], j].mean() - right[~chosen[:, i], j].mean()
    return found


def memorisations(right: np.ndarray, chosen: np.ndarray) -> list[float]:
    """mem(i) for all examples i."""
    return [right[chosen[:, i], i].mean() - right[~chosen[:, i], i].mean() for i in range(chosen.shape[1])]


def example_norms(x: np.ndarray, hidden: np.ndarray, back_hidden: np.ndarray, back_out: np.ndarray) -> list[float]:
    """Norm of each example's whole gradient: two matrices, which are outer products, and two biases."""
    found = []
    for row in range(len(x)):
        into, out = np.outer(x[row], back_hidden[row]), np.outer(hidden[row], back_out[row])
        parts = np.concatenate([into.ravel(), back_hidden[row], out.ravel(), back_out[row]])
        found.append(math.sqrt((parts**2).sum()))
    return found


def noise_for(epsilon: float, delta: float, steps: int) -> list[float]:
    """The noise at which the steps cost just epsilon, found by halving."""
    low, high = 1e-3, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        rho = steps / (2 * middle**2)
        low, high = (middle, high) if rho + 2 * math.sqrt(rho * math.log(1 / delta)) > epsilon else (low, middle)
    return [high]
