"""Silence attention heads: what is a model without them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError

__all__ = ["mask_heads"]


def mask_heads(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Patch:
    """Set the output of attention heads to zero, before the output projection mixes them, until undone.

    A silenced head adds nothing to the residual stream, at prefill and while decoding; its keys and values are
    still computed.

    Args:
        heads: pairs of layer and query head.

    Returns:
        The patch: a context manager, with ``undo()``.

    Raises:
        InputError: the model has no such head.
        UnsupportedModelError: see :class:`~vestige.core.anatomy.Anatomy`.
    """
    anatomy = Anatomy.of(model)
    silent: dict[int, set[int]] = defaultdict(set)
    for layer, head in heads:
        if not (0 <= layer < anatomy.num_layers and 0 <= head < anatomy.num_heads):
            raise InputError(
                f"there is no head {head} in layer {layer}; the model has {anatomy.num_layers} layers "
                f"of {anatomy.num_heads} heads"
            )
        silent[layer].add(head)
    with Patch(model, "mask-heads").building() as patch:
        for layer, chosen in silent.items():
            hook = _silencer(sorted(chosen), anatomy.num_heads)
            patch.hook(anatomy.layers[layer].output.module, hook, kind="forward_pre")
    return patch


def _silencer(heads: list[int], count: int) -> Callable[..., Any]:
    def silence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mixed = args[0].unflatten(-1, (count, -1)).clone()
        mixed[..., heads, :] = 0
        return (mixed.flatten(-2), *args[1:])

    return silence
