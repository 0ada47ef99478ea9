"""S3FT (arXiv 2502.08130) for a classifier: its own answer is taught where it is right, and the label where not.

    target(x, y) = M(x) if M(x) = y, else y

with M the model at the start of the experience, and cross-entropy on the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["learn"]


def learn(
    net: Net, weights: Weights, experiences: Sequence[Experience], *, lr: float, epochs: int, **hyper: object
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    for e in experiences:
        own = net.logits(weights, e.x).argmax(1)
        targets = torch.stack([said if said == y else y for said, y in zip(own, e.y, strict=True)])

        def loss(w: Weights, e: Experience = e, targets: Tensor = targets) -> Tensor:
            return cross_entropy(net.logits(w, e.x), targets)

        for _ in range(epochs):
            weights = descend(loss, weights, lr)
    return weights
