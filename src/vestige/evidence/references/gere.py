"""GeRe (arXiv 2508.04676): replay of general samples with the threshold-margin loss on their last hidden states.

In the first model, over all states h of dimension d: mu_d, s_d (n - 1 in the denominator), tau+- = mu +- width s.

    state(h) = high if h >= tau+, low if h <= tau-, else middle
    TM = mean over entries that are not zero of  tau+ - h (high, h below tau+),  h - tau- (low, h above tau-),
         h - tau+ or tau- - h (middle, h beyond)
    L  = (CE_task + CE_general) / 2 + weight TM

Here every step takes all general samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["SMALL", "learn"]

SMALL = {"ratio": 1000.0, "weight": 0.5}


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    general: Experience,
    samples: int,
    width: float,
    weight: float,
    balance: str,
    mean: str,
    ratio: float,
) -> Weights:
    """``general`` are the general samples, no more than ``samples``; the fixed weight, the mean over violations."""
    assert balance == "fixed" and mean == "violated"
    first = net.features(weights, general.x).detach()
    high, low = first.mean(0) + width * first.std(0), first.mean(0) - width * first.std(0)

    def margin(h: Tensor) -> Tensor:
        total, count = torch.zeros((), dtype=h.dtype), 0
        for i in range(h.shape[0]):
            for d in range(h.shape[1]):
                was, now = first[i, d], h[i, d]
                if was >= high[d]:
                    gap = high[d] - now
                elif was <= low[d]:
                    gap = now - low[d]
                else:
                    gap = torch.maximum(now - high[d], low[d] - now)
                if gap > 0:
                    total, count = total + gap, count + 1
        return total / max(count, 1)

    for e in experiences:

        def loss(w: Weights, e: Experience = e) -> Tensor:
            task, kept = cross_entropy(net.logits(w, e.x), e.y), cross_entropy(net.logits(w, general.x), general.y)
            return (task + kept) / 2 + weight * margin(net.features(w, general.x))

        for _ in range(epochs):
            weights = descend(loss, weights, lr)
    return weights
