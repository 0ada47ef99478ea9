"""DER++ (arXiv 2004.07211, equation 6): replay of logits and of labels.

    L = CE(new) + alpha mean_ic (z_ic - z'_ic)^2 + beta CE(stored)

z' are the logits that the model gave when a row was first trained on, before that update. Here the store holds all
rows and every draw takes all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["SMALL", "learn"]

SMALL = {"size": 1000, "ratio": 1000.0}


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    alpha: float,
    beta: float,
    **hyper: object,
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    stored: list[tuple[Experience, Tensor]] = []
    for e in experiences:
        for epoch in range(epochs):
            z_then = net.logits(weights, e.x).detach()

            def loss(w: Weights, e: Experience = e) -> Tensor:
                new = cross_entropy(net.logits(w, e.x), e.y)
                if not stored:
                    return new
                x, y = torch.cat([s.x for s, _ in stored]), torch.cat([s.y for s, _ in stored])
                z = net.logits(w, x)
                then = torch.cat([kept for _, kept in stored])
                return new + alpha * ((z - then) ** 2).mean() + beta * cross_entropy(z, y)

            weights = descend(loss, weights, lr)
            if epoch == 0:
                stored.append((e, z_then))
    return weights
