"""The attention that a model computes by itself, for those who put a function of their own in its place and call it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["OwnAttention"]


class OwnAttention:
    """The attention and mask functions of transformers by the name of an implementation.

    Args:
        implementation: as in ``config._attn_implementation``: ``"eager"``, ``"sdpa"``, a registered one.
    """

    def __init__(self, implementation: str | None) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = implementation or "eager"
        self._function = ALL_ATTENTION_FUNCTIONS.get(name)
        self.mask = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def function(self, module: nn.Module) -> Callable[..., Any]:
        """Registered ones by name; the eager one stands in the file that defines the attention module."""
        if self._function is not None:
            return self._function
        return sys.modules[type(module).__module__].eager_attention_forward
