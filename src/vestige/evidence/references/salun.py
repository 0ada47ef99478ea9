"""Saliency unlearning: random labels, where the gradient of the forget loss is among the largest.

s = |grad E_forget[NLL]|,  m_i = 1 iff s_i is among the largest share of all weights and not zero
"""

from __future__ import annotations

from typing import Any

from vestige.evidence.references import random_label_forgetting
from vestige.evidence.references.erasing import Weights, gradient, mean

__all__ = ["erase"]

SMALL = {"eraser": {"name": "random-label-forgetting", **random_label_forgetting.SMALL}}


def erase(
    row_loss: Any,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    drawn: list[Any],
    share: float,
    eraser: Any,
) -> Weights:
    """The weights after some steps of the inner eraser, that of random labels."""
    sizes = {
        name: g.abs() for name, g in gradient(lambda w: mean([row_loss(w, row) for row in forget]), weights).items()
    }
    order = sorted((float(s) for size in sizes.values() for s in size.flatten()), reverse=True)
    least = order[max(1, round(share * len(order))) - 1]
    mask = {name: ((size >= least) & (size > 0)).double() for name, size in sizes.items()}
    settings = {key: getattr(eraser, key) for key in ("learning_rate", "epochs", "clip", "retain_weight")}
    return random_label_forgetting.erase(row_loss, weights, forget, retain, drawn, mask=mask, **settings)
