"""Fine-tuning: one experience after the other, theta <- theta - lr dCE/dtheta, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["learn"]


def learn(net: Net, weights: Weights, experiences: Sequence[Experience], *, lr: float, epochs: int) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    for e in experiences:
        for _ in range(epochs):
            weights = descend(lambda w, e=e: cross_entropy(net.logits(w, e.x), e.y), weights, lr)  # type: ignore[misc]
    return weights
