"""The mode of a model: training or evaluation, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Evaluation mode inside the block, with or without gradients; every module's own mode after it."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
