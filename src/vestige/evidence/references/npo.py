"""Negative preference optimisation: down  (2 / beta) E_forget[log(1 + (p / p0)^beta)] + c E_retain[NLL].

p and p0 are the likelihoods of the whole answer, under the model and under the untouched one.
"""

from __future__ import annotations

from typing import Any

from vestige.evidence.references.erasing import Weights, descend, mean

__all__ = ["erase"]

SMALL = {"learning_rate": 5e-4, "epochs": 10, "target": 0.02, "check_every": 1}


def erase(
    row_loss: Any,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    beta: float,
    learning_rate: float,
    epochs: int,
    clip: float | None,
    retain_weight: float,
) -> Weights:
    """The weights after some steps."""
    untouched = [float(row_loss(weights, row, over="sum")) for row in forget]

    def loss(w: Weights) -> Any:
        ratios = [(p0 - row_loss(w, row, over="sum")).exp() for row, p0 in zip(forget, untouched, strict=True)]
        npo = 2 / beta * mean([(1 + ratio**beta).log() for ratio in ratios])
        return npo + retain_weight * mean([row_loss(w, row) for row in retain])

    return descend(loss, weights, learning_rate, epochs, clip)
