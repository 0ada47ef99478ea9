"""Selective synaptic dampening.

I_S = E_{z in S}[(d loss(z) / d w)^2] for S = the forget set, and all examples together. With ``batch-mean``, E runs
over batches and the loss is the mean of a batch's.

    selected iff  I_forget > alpha I_all;  w <- min(lambda I_all / I_forget, 1) w  where selected

alpha, if not given, is the percentile 100 - ln(1 + 100 n_forget / n_all) of I_forget / I_all over weights. Weights
whose I_forget is rounding noise (under 1e-12 of the largest) are left alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vestige.evidence.references.erasing import Weights, gradient, mean

__all__ = ["erase"]

SMALL = {"dampening": 0.1}


def importance(row_loss: Any, weights: Weights, parts: list[list[Any]]) -> Weights:
    """The mean over parts of the squared gradient of a part's mean loss."""

    def part_loss(part: list[Any]) -> Any:
        return lambda w: mean([row_loss(w, row) for row in part])

    squares = [gradient(part_loss(part), weights) for part in parts]
    return {name: torch.stack([s[name] ** 2 for s in squares]).mean(0) for name in weights}


def percentile(values: Tensor, q: float) -> float:
    """The value below which a share q (0 to 1) lies, on the line between the two nearest."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def erase(
    row_loss: Any,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    alpha: float | None,
    dampening: float,
    estimator: str,
) -> Weights:
    """The dampened weights."""
    parts = [[[row] for row in rows] if estimator == "per-example" else [rows] for rows in (forget, retain)]
    gone, every = importance(row_loss, weights, parts[0]), importance(row_loss, weights, parts[0] + parts[1])
    floor = 1e-12 * max(float(g.max()) for g in gone.values())
    if alpha is None:
        ratios = torch.cat([(gone[n] / every[n])[gone[n] > floor] for n in weights])
        share = len(forget) / (len(forget) + len(retain))
        alpha = max(percentile(ratios, 1 - math.log(1 + 100 * share) / 100), dampening)
    found = {}
    for name, w in weights.items():
        found[name] = w.double().clone()
        selected = (gone[name] > alpha * every[name]) & (gone[name] > floor)
        found[name][selected] *= (dampening * every[name] / gone[name])[selected].clamp(max=1)
    return found
