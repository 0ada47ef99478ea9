"""The same model with the weights of its blocks in four bits: small changes of weights vanish in the rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch

__all__ = ["four_bit", "in_four_bits"]

BLOCK = 64
"""Numbers, side by side along the inputs, that share one scale."""


def four_bit(weight: Tensor) -> Tensor:
    """A matrix (out, in) rounded to 15 evenly spaced values per block: w = s round(w / s), s = max |w| / 7."""
    rows, width = weight.shape
    wide = F.pad(weight.float(), (0, -width % BLOCK)).view(rows, -1, BLOCK)
    scale = (wide.abs().amax(-1, keepdim=True) / 7).clamp(min=torch.finfo(torch.float32).tiny)
    return ((wide / scale).round() * scale).view(rows, -1)[:, :width].to(weight.dtype)


@contextmanager
def in_four_bits(model: nn.Module) -> Iterator[int]:
    """The linear maps of all blocks in four bits inside the block; gives how many numbers that are.

    Embeddings, norms and the output layer stay, as in the usual four-bit models.

    Raises:
        UnsupportedModelError: an unknown architecture.
    """
    maps: dict[int, nn.Module] = {}
    for layer in Anatomy.of(model).layers:
        for each in (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down):
            if each is not None:
                maps[id(each.stored)] = each.module
    patch = Patch(model, "four bits")
    with patch:
        for linear in maps.values():
            linear = getattr(linear, "base_layer", linear)
            weight = linear.weight.detach()
            rounded = four_bit(weight.T).T if isinstance(linear, Conv1D) else four_bit(weight)
            patch.parameter(linear.weight, rounded)
        yield sum(linear.weight.numel() for linear in (getattr(m, "base_layer", m) for m in maps.values()))
