"""A long prompt's way through the feed-forward parts: some tokens after the others.

What a model holds at its widest while it reads a prompt is between the projections of a feed-forward part, several
times the size of the hidden states. Each token goes through there by itself, so a long prompt can go in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOKENS", "in_blocks"]

TOKENS = 2048  # of all rows of the batch: enough to use a GPU to the full


def in_blocks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A feed-forward module's ``forward`` that takes ``(batch, tokens, dim)`` in blocks, where nothing is learnt."""

    @functools.wraps(forward)
    def blockwise(states: Tensor, *rest: Any, **named: Any) -> Any:
        width = max(1, TOKENS // max(1, states.shape[0]))
        if torch.is_grad_enabled() or states.dim() != 3 or states.shape[1] <= width:
            return forward(states, *rest, **named)
        first, *others = states.split(width, dim=1)
        part = forward(first, *rest, **named)
        if not isinstance(part, Tensor):  # some mixtures of experts give their routing too
            return forward(states, *rest, **named)
        whole = part.new_empty(*states.shape[:2], part.shape[2])
        whole[:, :width] = part
        for number, block in enumerate(others, start=1):
            whole[:, number * width : (number + 1) * width] = forward(block, *rest, **named)
        return whole

    return blockwise
