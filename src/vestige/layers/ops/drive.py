"""What drives the recurrence that linear attention, its gated forms, state-space models and the delta rule share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["FAINTEST", "Drive", "per_token", "serve"]

FAINTEST = -40.0
"""Logarithm of the strongest decay of one token: what is left of anything then is below every digit of float32, and a
sum of logarithms that runs deeper would cost the digits of those that follow."""


@dataclass(frozen=True)
class Drive:
    """What drives the recurrence: what each token reads with, writes, and lets fade.

    Attributes:
        q, k: ``(batch, length, heads, keys)``; they may have fewer heads than the values, if the numbers divide: each
            then serves a group of neighbouring value heads.
        v: ``(batch, length, heads, values)``.
        decay: logarithm of the decay, at most 0: ``(heads,)`` fixed, ``(batch, length, heads)`` or
            ``(batch, length, heads, keys)``; ``None``: nothing fades.
        beta: ``(batch, length, heads)`` the rate of the delta rule; ``None``: values are added.
        scale: factor of what is read.
        bounded: whether each decay is known to be finite and not far below :data:`FAINTEST`, as the logarithm of a
            sigmoid is: then nothing is spent to hold it above.
    """

    q: Float[Tensor, "batch length groups keys"]
    k: Float[Tensor, "batch length groups keys"]
    v: Float[Tensor, "batch length heads values"]
    decay: Float[Tensor, ...] | None = None
    beta: Float[Tensor, "batch length heads"] | None = None
    scale: float = 1.0
    bounded: bool = False

    @property
    def differentiated(self) -> bool:
        """Whether a backward pass may follow."""
        if not torch.is_grad_enabled():
            return False
        return any(t is not None and t.requires_grad for t in (self.q, self.k, self.v, self.decay, self.beta))

    def blanked(self, valid: Bool[Tensor, "batch length"] | None) -> Drive:
        """The drive with padding taken out: a token that is not valid writes nothing and lets nothing fade."""
        if valid is None:
            return self
        k = self.k.masked_fill(~valid[:, :, None, None], 0)
        decay = self.decay
        if decay is not None:
            decay = per_token(decay, self.v)
            decay = decay.masked_fill(~valid.view(*valid.shape, *[1] * (decay.dim() - 2)), 0)
        return replace(self, k=k, decay=decay)


def per_token(decay: Tensor, v: Tensor) -> Tensor:
    """A decay that is fixed per head, for every token."""
    return decay.expand(v.shape[:3]) if decay.dim() == 1 else decay


def serve(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat heads, each for its group."""
    return tensor if tensor.shape[dim] == heads else tensor.repeat_interleave(heads // tensor.shape[dim], dim)
