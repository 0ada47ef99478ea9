"""How weights are drawn."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

__all__ = ["initialise"]


@torch.no_grad()
def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of a module and of all below it.

    Linear maps and embeddings from a normal distribution, biases zero; a module that has a method ``draw()`` draws
    its own parameters. What a checkpoint has already filled is left alone.
    """
    for part in module.modules():
        initialise_one(part, std)


@torch.no_grad()
def initialise_one(part: nn.Module, std: float) -> None:
    """The same for the parameters of one module alone."""
    if isinstance(part, nn.Linear):
        init.normal_(part.weight, mean=0.0, std=std)
        if part.bias is not None:
            init.zeros_(part.bias)
    elif isinstance(part, nn.Embedding):
        init.normal_(part.weight, mean=0.0, std=std)
        if part.padding_idx is not None:
            init.zeros_(part.weight[part.padding_idx])
    elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
        if part.weight is not None:
            init.ones_(part.weight)
        if getattr(part, "bias", None) is not None:
            init.zeros_(part.bias)
    elif hasattr(part, "draw"):
        part.draw()
