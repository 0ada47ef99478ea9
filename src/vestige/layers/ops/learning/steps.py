"""What else a memory's rule may do: steps of equal size in every direction, and features of keys."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FeatureName", "features", "features_of", "newton_schulz", "width_of"]

QUINTIC = (3.4445, -4.7750, 2.0315)
FeatureName = Literal["none", "powers", "polynomial"]


def newton_schulz(
    matrix: Float[Tensor, "... rows columns"], iterations: int, eps: float = 1e-7
) -> Float[Tensor, "... rows columns"]:
    """A matrix with its singular values brought near one (between 0.7 and 1.2), by Muon's iteration.

    ``X <- a X + (b X X' + c (X X')^2) X``, begun from the matrix over its Frobenius norm. Nothing stays nothing.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.square().sum((-2, -1), keepdim=True) + eps**2).sqrt()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def features(name: FeatureName, dim: int, degree: int) -> Tensor:
    """Which channels each feature is the product of, ``(features, degree)``; ``dim`` stands for a one.

    ``polynomial``: every product of up to ``degree`` channels, once; ``powers``: powers of single channels.
    """
    if name == "none":
        return torch.arange(dim)[:, None]
    if name == "powers":
        rows = [
            [channel] * power + [dim] * (degree - power) for power in range(1, degree + 1) for channel in range(dim)
        ]
        return torch.tensor(rows)
    return torch.combinations(torch.arange(dim + 1), degree, with_replacement=True)


def width_of(name: FeatureName, dim: int, degree: int) -> int:
    """How many features there are, without making them."""
    return {"none": dim, "powers": dim * degree, "polynomial": math.comb(dim + degree, degree)}[name]


def features_of(
    x: Float[Tensor, "... dim"], which: Tensor, scale: Float[Tensor, " degrees"] | None = None
) -> Float[Tensor, "... features"]:
    """Products of channels, as :func:`features` names them.

    Args:
        scale: a factor for each number of channels multiplied, from none at all.
    """
    if which.shape[1] == 1 and scale is None:
        return x
    extended = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    product = extended[..., which[:, 0]]
    for column in which.unbind(1)[1:]:
        product = product * extended[..., column]
    return product if scale is None else product * scale[(which < x.shape[-1]).sum(1)]
