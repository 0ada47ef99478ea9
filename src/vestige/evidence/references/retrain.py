"""Retraining: from weights that never saw the rows to forget, down  E_retain[NLL]."""

from __future__ import annotations

from typing import Any

from vestige.evidence.references.erasing import Weights, descend, mean

__all__ = ["erase"]

SMALL = {"learning_rate": 3e-3, "epochs": 12}


def erase(
    row_loss: Any, fresh: Weights, retain: list[Any], learning_rate: float, epochs: int, clip: float | None
) -> Weights:
    """The weights after some steps."""
    return descend(lambda w: mean([row_loss(w, row) for row in retain]), fresh, learning_rate, epochs, clip)
