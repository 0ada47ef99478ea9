"""The variants of Xue et al. 2025 (arXiv 2510.11602), token by token: forms of causal weights, and what they cost.

The form ``exp(q k / sqrt(d))``, normalised, is standard attention. Its relaxations are the first terms of the
exponential's series, and a softmax over what each token's own query and key come to, without any pairs. What queries
and keys are made of is another matter: from the layer's input, the embeddings, or what the layers below make of a fixed
sequence, the weights come by the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["SMALL", "examples", "gain_kept", "gated", "perplexity_ratio", "rotate", "softmax", "taylor"]

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


def gated(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``e^(sum_j x_j sigma(x_j) k_j / sqrt(d))`` of a token, ``x`` its own query, over those of all up to it."""
    loud = []
    for own, key in zip(q, k, strict=True):
        heard = [x / (1 + math.exp(-x)) * y for x, y in zip(own, key, strict=True)]
        loud.append(math.exp(math.fsum(heard) / math.sqrt(len(own))))
    weights = np.zeros((len(q), len(k)))
    for t in range(len(q)):
        weights[t, : t + 1] = np.array(loud[: t + 1]) / math.fsum(loud[: t + 1])
    return weights


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
        "gated": pair,
        "rotate": {"x": chance.normal(size=(7, 8))},
        "gain_kept": {"loss": 0.3 * plain + 0.7 * alone, "plain": plain, "alone": alone},
        "perplexity_ratio": {"loss": alone, "plain": plain},
    }
