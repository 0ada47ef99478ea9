"""What references of erasers are written with: gradients of single rows, and Adam as in its paper.

The reference of an eraser offers ``erase(row_loss, weights, ..., **hyper-parameters) -> weights``. ``weights`` maps
names to float64 arrays, ``row_loss(weights, row, labels=None, over="mean")`` is the negative log-likelihood of one row
(of its own labels, or of others), ``forget`` and ``retain`` are lists of rows that make one batch each. Further
arguments by name: ``drawn`` (random labels, one per row to forget), ``fresh`` (weights that saw none of the rows),
``row_logits(weights, row)`` (logits and the labels that they are to predict; in a language model one pair per token),
``linear`` (the names of the weights of each block's linear maps, by ``"mlp"`` and ``"attention"``), ``causal``.
``SMALL`` holds hyper-parameters with which the small models of the certificate forget in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Weights", "descend", "gradient", "mean"]

Weights = dict[str, Tensor]


def mean(values: list[Tensor]) -> Tensor:
    """The mean of scalars."""
    return torch.stack(values).mean()


def gradient(loss: Callable[[Weights], Tensor], weights: Weights) -> Weights:
    """The gradient of a scalar; zero for weights that it does not depend on."""
    free = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    found = torch.autograd.grad(loss(free), list(free.values()), allow_unused=True)
    pairs = zip(free.items(), found, strict=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}


def descend(
    loss: Callable[[Weights], Tensor],
    weights: Weights,
    learning_rate: float,
    epochs: int,
    clip: float | None,
    mask: Any = None,
    later: Callable[[Weights], Tensor] | None = None,
    start: float = 0,
) -> Weights:
    """Adam (Kingma and Ba 2015, algorithm 1) on one batch, with gradients that are masked, then clipped.

    From epoch ``start`` on (the first is 0) the loss is ``later``, where there is one.

    m <- 0.9 m + 0.1 g;  v <- 0.999 v + 0.001 g^2;  w <- w - lr (m / (1 - 0.9^t)) / (sqrt(v / (1 - 0.999^t)) + 1e-8)
    """
    weights = {name: w.detach().double().clone() for name, w in weights.items()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t in range(1, epochs + 1):
        g = gradient(later if later is not None and t - 1 >= start else loss, weights)
        if mask is not None:
            g = {name: g[name] * mask[name] for name in g}
        norm = sum(float(x.square().sum()) for x in g.values()) ** 0.5
        for name in weights:
            part = g[name] if clip is None or norm <= clip else g[name] * clip / norm
            m[name] = 0.9 * m[name] + 0.1 * part
            v[name] = 0.999 * v[name] + 0.001 * part**2
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            weights[name] = weights[name] - learning_rate * step
    return weights
