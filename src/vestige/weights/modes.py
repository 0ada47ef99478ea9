"""The mode of a model for a while: training or evaluation, and what the Trainer writes into its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "same_use_of_cache"]


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


@contextmanager
def same_use_of_cache(model: nn.Module) -> Iterator[None]:
    """The config's own ``use_cache`` after the block: transformers' ``Trainer`` writes its own there, for good."""
    config = getattr(model, "config", None)
    fields = {} if config is None else vars(config)
    had = {name: value for name, value in fields.items() if name == "use_cache"}
    try:
        yield
    finally:
        fields.pop("use_cache", None)
        fields.update(had)
