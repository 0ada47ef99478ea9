"""Experience replay (arXiv 1902.10486, algorithm 1): the mean loss over new and stored rows.

    L = (n CE(new) + b CE(stored)) / (n + b)

Rows enter the store after the first update that they took part in. Here it is large enough for all, so no row leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["SMALL", "learn"]

SMALL = {"size": 1000, "ratio": 1000.0}


def learn(
    net: Net, weights: Weights, experiences: Sequence[Experience], *, lr: float, epochs: int, **hyper: object
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    stored: list[Experience] = []
    for e in experiences:
        for epoch in range(epochs):

            def loss(w: Weights, e: Experience = e) -> Tensor:
                new = cross_entropy(net.logits(w, e.x), e.y)
                if not stored:
                    return new
                x, y = torch.cat([s.x for s in stored]), torch.cat([s.y for s in stored])
                n, b = len(e.y), len(y)
                return (n * new + b * cross_entropy(net.logits(w, x), y)) / (n + b)

            weights = descend(loss, weights, lr)
            if epoch == 0:
                stored.append(e)
    return weights
