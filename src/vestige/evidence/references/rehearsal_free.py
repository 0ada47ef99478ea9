"""Rehearsal-free learning (arXiv 2203.17269, section 3), theta* the weights before the experience, C its classes, O the
classes of those before.

    L2        sum_j (theta_j - theta*_j)^2
    EWC       sum_j F_j (theta_j - theta*_j)^2,   F_j = sum over experiences of mean_i (d CE_i / d theta_j)^2
    PredKD    sum over c in O of BCE(sigmoid z*_c, z_c) with a sigmoid head,
              T^2 KL(softmax z*_O / T, softmax z_O / T) with another
    FeatKD    |f - f*|^2

each a mean over rows where rows occur. The task's own loss is BCE over C with a sigmoid head, cross-entropy over C
with the current one, over all classes with softmax. Weights of the output layer for classes outside O are not held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import (
    Experience,
    Net,
    Weights,
    cross_entropy,
    descend,
    gradient,
    seen_before,
)

__all__ = ["SMALL", "learn"]

SMALL = {"l2": 0.05, "ewc": 0.5, "prediction": 0.7, "feature": 0.02}


def bce(z: Tensor, target: Tensor) -> Tensor:
    """-sum_c t log s(z) + (1 - t) log(1 - s(z)), mean over rows."""
    s = torch.sigmoid(z)
    return -(target * s.log() + (1 - target) * (1 - s).log()).sum(1).mean()


def fisher(net: Net, weights: Weights, e: Experience) -> Weights:
    """mean_i (d CE_i / d theta)^2, one row at a time."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for x, y in zip(e.x, e.y, strict=True):
        slope = gradient(lambda w, x=x, y=y: cross_entropy(net.logits(w, x[None]), y[None]), weights)  # type: ignore[misc]
        total = {name: total[name] + slope[name] ** 2 / len(e.y) for name in weights}
    return total


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    l2: float,
    ewc: float,
    prediction: float,
    feature: float,
    head: str,
    temperature: float,
    from_start: bool,
    decay: float,
    attention_only: bool,
    fisher_rows: int,
) -> Weights:
    """``attention_only`` trains fewer weights, and ``fisher_rows`` looks at fewer rows; both are left out here."""
    assert not attention_only and not fisher_rows
    fishers: Weights = {}
    for n, e in enumerate(experiences):
        old, star = seen_before(experiences, n), dict(weights)
        holds = n > 0 or from_start

        def mask(name: str, w: Tensor, old: list[int] = old) -> Tensor:
            if not name.startswith("classifier."):
                return torch.ones_like(w)
            known = torch.zeros_like(w)
            known[old] = 1
            return known

        def loss(
            w: Weights,
            n: int = n,
            e: Experience = e,
            old: list[int] = old,
            star: Weights = star,
            fishers: Weights = fishers,
        ) -> Tensor:
            z, C = net.logits(w, e.x), e.classes
            place = torch.tensor([C.index(int(c)) for c in e.y])
            if head == "softmax":
                value = cross_entropy(z, e.y)
            elif head == "current":
                value = cross_entropy(z[:, C], place)
            else:
                value = bce(z[:, C], torch.eye(len(C), dtype=z.dtype)[place])
            if not (n > 0 or from_start):
                return value
            if prediction and n > 0:
                was = net.logits(star, e.x).detach()[:, old]
                if head == "sigmoid":
                    value = value + prediction * bce(z[:, old], torch.sigmoid(was))
                else:
                    p, q = (was / temperature).softmax(1), (z[:, old] / temperature).log_softmax(1)
                    value = value + prediction * temperature**2 * (p * (p.log() - q)).sum(1).mean()
            if feature:
                gap = net.features(w, e.x) - net.features(star, e.x).detach()
                value = value + feature * (gap**2).sum(1).mean()
            for name, now in w.items():
                gap = mask(name, now) * (now - star[name]) ** 2
                value = value + l2 * gap.sum()
                if fishers:
                    value = value + ewc * (fishers[name] * gap).sum()
            return value

        assert holds or not fishers
        for _ in range(epochs):
            weights = descend(loss, weights, lr)
        if ewc:
            new = fisher(net, weights, e)
            fishers = {name: decay * fishers[name] + f if fishers else f for name, f in new.items()}
    return weights
