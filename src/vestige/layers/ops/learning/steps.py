"""What else a memory's rule may do: steps of equal size in every direction, and features of keys."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FeatureName", "Features", "equaliser", "newton_schulz", "width_of"]

QUINTIC = (3.4445, -4.7750, 2.0315)
SAFE = 6
FeatureName = Literal["none", "powers", "polynomial"]


def newton_schulz(matrix: Float[Tensor, "... rows columns"], iterations: int) -> Float[Tensor, "... rows columns"]:
    """A matrix with its singular values brought near one (between 0.7 and 1.2), by Muon's iteration.

    ``X <- a X + (b X X' + c (X X')^2) X``, begun from the matrix over its Frobenius norm. Nothing stays nothing.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return matrix @ equaliser(matrix.mT @ matrix, iterations)
    return equaliser(matrix @ matrix.mT, iterations) @ matrix


def equaliser(
    square: Float[Tensor, "... side side"], iterations: int, eps: float = 1e-7
) -> Float[Tensor, "... side side"]:
    """What that iteration multiplies a matrix by, from its product with itself: its smaller side is all that is needed.

    Small singular values lose digits, which each iteration doubles and more: beyond a few it takes those of float64.
    """
    a, b, c = QUINTIC
    kind = torch.float64 if iterations > SAFE else square.dtype
    size = square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + eps**2
    rest = (square / size).to(kind).reshape(-1, *square.shape[-2:])
    one = torch.eye(square.shape[-1], dtype=kind, device=square.device)
    found = one.expand_as(rest)
    for index in range(iterations):
        turn = torch.baddbmm(torch.add(a * one, rest, alpha=b), rest, rest, alpha=c)
        found = torch.bmm(found, turn) if index else turn
        if index < iterations - 1:
            rest = torch.bmm(torch.bmm(rest, turn), turn)
    return found.view(square.shape).to(size.dtype) * size.rsqrt()


@dataclass(frozen=True)
class Features:
    """Products of channels.

    Attributes:
        which: ``(features, degree)`` the channels that are multiplied; the number of channels stands for a one.
        order: ``(features,)`` how many they are.
        weight: ``(features,)`` the root of the number of ways to order them, so that the features of two vectors of one
            order multiply to a power of the vectors' product.
    """

    which: Tensor
    order: Tensor
    weight: Tensor

    @classmethod
    def of(cls, name: FeatureName, dim: int, degree: int, like: Tensor) -> Features | None:
        """``polynomial``: every product of up to ``degree`` channels, once; ``powers``: powers of single channels."""
        if name == "none":
            return None
        return cls(*_kept_features(name, dim, degree, like.device, like.dtype))

    def __call__(self, x: Float[Tensor, "... dim"], scale: Float[Tensor, " degrees"]) -> Float[Tensor, "... features"]:
        """The features; ``scale`` is a factor for each order, from none at all."""
        extended = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        product = extended[..., self.which[:, 0]] * (self.weight * scale[self.order])
        for column in self.which.unbind(1)[1:]:
            product = product * extended[..., column]
        return product


@torch.compiler.assume_constant_result
def _kept_features(*asked: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Made once: the same tokens after tokens, and nothing is copied to the device while a graph is captured."""
    return _features(*asked)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _features(
    name: FeatureName, dim: int, degree: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if name == "powers":
        powers = range(1, degree + 1)
        which = torch.tensor([[channel] * p + [dim] * (degree - p) for p in powers for channel in range(dim)])
    else:
        which = torch.combinations(torch.arange(dim + 1), degree, with_replacement=True)
    order = (which < dim).sum(1)
    count = torch.nn.functional.one_hot(which, dim + 1)[..., :dim].sum(1)
    ways = (torch.lgamma(order + 1.0) - torch.lgamma(count + 1.0).sum(1)).exp().round()
    return which.to(device), order.to(device), ways.to(device, dtype).sqrt()


def width_of(name: FeatureName, dim: int, degree: int) -> int:
    """How many features there are, without making them."""
    return {"none": dim, "powers": dim * degree, "polynomial": math.comb(dim + degree, degree)}[name]
