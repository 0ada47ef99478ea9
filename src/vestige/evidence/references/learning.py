"""Plain gradient descent through a stream, which the references of all learners share.

Experiences are learnt with whole batches in float64 and one step per epoch, without momentum, clipping or schedule:

    theta <- theta - lr dL/dtheta.

A learner's reference offers ``learn(net, weights, experiences, *, lr, epochs, **hyper-parameters)`` and returns the
weights at the end. ``SMALL`` there holds hyper-parameters for which every draw from a buffer takes all of it, so that
nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

__all__ = ["Experience", "Net", "Weights", "cross_entropy", "descend", "gradient"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Experience:
    """All training rows of an experience."""

    x: Float[Tensor, "rows ..."]
    y: Int[Tensor, " rows"]

    @property
    def classes(self) -> list[int]:
        return sorted(set(self.y.tolist()))


@dataclass(frozen=True)
class Net:
    """A classifier as a function of its weights; ``module`` says what the weights are called."""

    module: Any

    def logits(self, weights: Weights, x: Tensor) -> Float[Tensor, "rows classes"]:
        return functional_call(self.module, weights, (), {"pixel_values": x}).logits

    def features(self, weights: Weights, x: Tensor) -> Float[Tensor, "rows dim"]:
        """What goes into the output layer: the class token after the last norm."""
        outputs = functional_call(self.module, weights, (), {"pixel_values": x, "output_hidden_states": True})
        last = outputs.hidden_states[-1]
        norm = {n.removeprefix("vit.layernorm."): w for n, w in weights.items() if n.startswith("vit.layernorm.")}
        return F.layer_norm(last, last.shape[-1:], norm["weight"], norm["bias"], self.module.config.layer_norm_eps)[
            :, 0
        ]


def cross_entropy(logits: Float[Tensor, "rows classes"], y: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """-mean_i log softmax(z_i)[y_i]"""
    return -logits.log_softmax(-1)[torch.arange(len(y)), y].mean()


def gradient(loss: Callable[[Weights], Tensor], weights: Weights) -> Weights:
    """dL/dtheta by name."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


def descend(loss: Callable[[Weights], Tensor], weights: Weights, lr: float) -> Weights:
    """One step of plain gradient descent."""
    slope = gradient(loss, weights)
    return {name: w - lr * slope[name] for name, w in weights.items()}


def seen_before(experiences: Sequence[Experience], n: int) -> list[int]:
    """The classes of the experiences before the n-th."""
    return sorted({c for e in experiences[:n] for c in e.classes})
