"""Forgetting by random labels: down  E_forget[NLL of labels drawn once] + c E_retain[NLL]."""

from __future__ import annotations

from typing import Any

from vestige.evidence.references.erasing import Weights, descend, mean

__all__ = ["erase"]

SMALL = {"learning_rate": 1e-3, "epochs": 12, "target": 0.02, "check_every": 1}


def erase(
    row_loss: Any,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    drawn: list[Any],
    learning_rate: float,
    epochs: int,
    clip: float | None,
    retain_weight: float,
    mask: Any = None,
) -> Weights:
    """The weights after some steps."""

    def loss(w: Weights) -> Any:
        wrong = mean([row_loss(w, row, labels=labels) for row, labels in zip(forget, drawn, strict=True)])
        return wrong + retain_weight * mean([row_loss(w, row) for row in retain])

    return descend(loss, weights, learning_rate, epochs, clip, mask)
