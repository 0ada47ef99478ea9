"""Self-contrastive decoding of Zhang et al. 2024 (arXiv 2407.08039, section 5), one token at a time.

With P the model's probabilities after the whole prompt X, and Q those after the prompt without one condition, X':

    V(P)  = {y : P(y) >= alpha max P},   V(Q) likewise,
    R(y)  = log P(y) / Q(y)                          for y in V(P) and V(Q),
    E(y)  = log P(y) / (alpha max Q)                 for y in V(P) that escaped from V(Q),
    S(X') = sum of min(R, 0) + sum of E.

The condition with the lowest S is what is overshadowed. At a step where S lies below the threshold, the token goes by
R and E, and tokens outside V(P) are out; at others it goes by P.

The paper divides an escaping token's probability by the smallest one in V(Q). Of a large vocabulary that is about
alpha max Q, which is taken here: where few tokens are plausible the smallest may be the largest itself, and then no
escaping token could ever win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["choose", "contrast", "decode", "indicator"]


def contrast(p: Sequence[float], q: Sequence[float], alpha: float) -> list[float]:
    """R or E of every token, minus infinity outside V(P)."""
    scores = []
    for here, there in zip(p, q, strict=True):
        if here < alpha * max(p):
            scores.append(-math.inf)
        elif there >= alpha * max(q):
            scores.append(math.log(here / there))
        else:
            scores.append(math.log(here / (alpha * max(q))))
    return scores


def indicator(p: Sequence[float], q: Sequence[float], alpha: float) -> float:
    """S."""
    total = 0.0
    for score, here, there in zip(contrast(p, q, alpha), p, q, strict=True):
        if here >= alpha * max(p):
            total += min(score, 0.0) if there >= alpha * max(q) else score
    return total


def choose(p: Sequence[float], shortened: Sequence[Sequence[float]], alpha: float) -> int:
    """Which of the shortened prompts' probabilities have the lowest S; the first of equal ones."""
    values = [indicator(p, q, alpha) for q in shortened]
    return values.index(min(values))


def decode(p: Sequence[float], q: Sequence[float], alpha: float, threshold: float) -> int:
    """The token that greedy decoding says."""
    by = contrast(p, q, alpha) if indicator(p, q, alpha) < threshold else list(p)
    return by.index(max(by))
