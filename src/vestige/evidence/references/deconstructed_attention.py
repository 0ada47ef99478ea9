"""The variants of Xue et al. 2025 (arXiv 2510.11602), token by token: forms of causal weights, and what they cost.

The form ``exp(q k / sqrt(d))``, normalised, is standard attention. Its relaxations are the first terms of the
exponential's series, and a product of positive features. What queries and keys are made of is another matter: from the
layer's input, the embeddings, random vectors or a fixed sequence, the weights come by the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["SMALL", "elu", "examples", "gain_kept", "perplexity_ratio", "rotate", "softmax", "taylor"]

# A run of a second or two.
SMALL = {"hidden": 8, "heads": 1, "layers": 2, "length": 8, "rows": 2, "steps": 2, "blocks": 5}


def causal(q: np.ndarray, k: np.ndarray, similarity: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    """Weights of every query over its own and earlier keys, summing to one."""
    weights = np.zeros((len(q), len(k)))
    for t in range(len(q)):
        alike = [similarity(q[t], k[s]) for s in range(t + 1)]
        weights[t, : t + 1] = np.array(alike) / math.fsum(alike)
    return weights


def softmax(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``exp(s)``."""
    return causal(q, k, lambda a, b: math.exp(a @ b / math.sqrt(len(a))))


def taylor(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``1 + s + s^2 / 2``."""
    return causal(q, k, lambda a, b: sum((a @ b / math.sqrt(len(a))) ** n / math.factorial(n) for n in range(3)))


def elu(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``phi(q) phi(k)`` with ``phi(x) = x + 1`` above zero and ``exp(x)`` below."""

    def phi(x: np.ndarray) -> np.ndarray:
        return np.array([value + 1 if value > 0 else math.exp(value) for value in x])

    return causal(q, k, lambda a, b: float(phi(a) @ phi(b)))


def rotate(x: np.ndarray) -> np.ndarray:
    """Each pair ``(x_j, x_{j + d/2})`` as a complex number, times ``e^{i t 10000^{-2j/d}}``."""
    half = x.shape[1] // 2
    turned = [
        [complex(row[j], row[j + half]) * np.exp(1j * t * 10_000 ** (-2 * j / x.shape[1])) for j in range(half)]
        for t, row in enumerate(x)
    ]
    return np.concatenate([np.real(turned), np.imag(turned)], axis=1)


def gain_kept(loss: float, plain: float, alone: float) -> float:
    """1 at the loss of the plain model, 0 at that of the model without mixing, straight in between."""
    return float(np.interp(-loss, [-alone, -plain], [0, 1]))


def perplexity_ratio(loss: float, plain: float) -> float:
    """``e^loss / e^plain``."""
    return math.exp(loss) / math.exp(plain)


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the formulas with."""
    pair = {"q": 2 * chance.normal(size=(9, 6)), "k": 2 * chance.normal(size=(9, 6))}
    plain, alone = 1 + chance.random(), 2.5 + chance.random()
    return {
        "softmax": pair,
        "taylor": pair,
        "elu": pair,
        "rotate": {"x": chance.normal(size=(7, 8))},
        "gain_kept": {"loss": 0.3 * plain + 0.7 * alone, "plain": plain, "alone": alone},
        "perplexity_ratio": {"loss": alone, "plain": plain},
    }
