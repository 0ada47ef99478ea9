"""Where the patches of an image look: attention weights of a vision transformer, seen on the grid of patches."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["hop_profile", "hops", "landing_map", "mean_distance", "offset_map"]


def hops(rows: int, columns: int) -> Int[Tensor, "patches patches"]:
    """How many steps, also diagonal ones, lie between two patches of a grid; patches run row by row."""
    down, across = _steps(rows, columns)
    return torch.maximum(down.abs(), across.abs())


def hop_profile(
    attention: Float[Tensor, "... patches patches"], rows: int, columns: int
) -> Float[Tensor, "... distances"]:
    """Attention that a patch gives to all patches 0, 1, 2, ... hops away together; mean over the patches that look.

    What is missing from one went to tokens that are no patches.
    """
    apart = hops(rows, columns).to(attention.device)
    found = [(attention * (apart == k)).sum(dim=-1).mean(dim=-1) for k in range(max(rows, columns))]
    return torch.stack(found, dim=-1)


def mean_distance(attention: Float[Tensor, "... patches patches"], rows: int, columns: int) -> Float[Tensor, " ..."]:
    """Mean distance, in patches as the crow flies, of what is looked at, weighted by attention."""
    down, across = (step.to(attention) for step in _steps(rows, columns))
    among = attention.sum(dim=-1).clamp_min(torch.finfo(attention.dtype).tiny)
    return ((attention * (down.square() + across.square()).sqrt()).sum(dim=-1) / among).mean(dim=-1)


def offset_map(
    attention: Float[Tensor, "... patches patches"], rows: int, columns: int
) -> Float[Tensor, "... heights widths"]:
    """Mean attention by the step from the patch that looks to the one looked at, ``(2 rows - 1, 2 columns - 1)``.

    No step is in the middle, up and left above and left of it. The mean is over the pairs of patches that are that
    step apart, so that a pattern that follows the patch looks the same for patches at the border.
    """
    down, across = _steps(rows, columns)
    place = ((down + rows - 1) * (2 * columns - 1) + across + columns - 1).flatten().to(attention.device)
    cells = (2 * rows - 1) * (2 * columns - 1)
    flat = attention.flatten(-2)
    total = flat.new_zeros(*flat.shape[:-1], cells).index_add_(-1, place, flat)
    count = flat.new_zeros(cells).index_add_(0, place, torch.ones_like(place, dtype=flat.dtype))
    return (total / count).unflatten(-1, (2 * rows - 1, 2 * columns - 1))


def landing_map(
    attention: Float[Tensor, "... patches patches"], rows: int, columns: int
) -> Float[Tensor, "... rows columns"]:
    """Attention that each patch receives, mean over the patches that look."""
    return attention.mean(dim=-2).unflatten(-1, (rows, columns))


def _steps(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Steps down and across from each patch to each other, ``(patches, patches)`` each."""
    down, across = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return down[None] - down[:, None], across[None] - across[:, None]
