"""Gradient ascent with a retain term: down  c E_retain[NLL] - E_forget[NLL]."""

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
    learning_rate: float,
    epochs: int,
    clip: float | None,
    retain_weight: float,
) -> Weights:
    """The weights after some steps."""

    def loss(w: Weights) -> Any:
        kept, gone = mean([row_loss(w, row) for row in retain]), mean([row_loss(w, row) for row in forget])
        return retain_weight * kept - gone

    return descend(loss, weights, learning_rate, epochs, clip)
