"""Influence approximation unlearning: one step along  d = grad E_forget[NLL] - c grad E_retain[NLL].

w <- w + eta d            ("sgd")
w <- w + eta d / (|d| + 1e-8)    ("adam": the first step of Adam; nothing where d is rounding noise)
"""

from __future__ import annotations

from typing import Any

from vestige.evidence.references.erasing import Weights, gradient, mean

__all__ = ["erase"]

SMALL: dict[str, Any] = {"step": 1e-2, "tolerance": 0.25}


def erase(
    row_loss: Any,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    step: float,
    rule: str,
    correction: float,
) -> Weights:
    """The weights after the step."""
    up = gradient(lambda w: mean([row_loss(w, row) for row in forget]), weights)
    down = gradient(lambda w: mean([row_loss(w, row) for row in retain]), weights)
    d = {name: up[name] - correction * down[name] for name in weights}
    noise = 1e-8 * max(float(g.abs().max()) for g in d.values())
    if rule == "adam":
        d = {name: g / (g.abs() + 1e-8) * (g.abs() > noise) for name, g in d.items()}
    return {name: w.double() + step * d[name] for name, w in weights.items()}
