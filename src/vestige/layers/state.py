"""What one layer holds between passes: named tensors, whatever the mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vestige.errors import InputError

__all__ = ["LayerState", "nbytes_of"]


class LayerState(CacheLayerMixin):
    """Named tensors, batch first, and the number of tokens that went into them.

    One class serves keys and values that grow, windows that roll and matrices that stay, so that whatever is done to
    a model's state (reorder, fork, save, count) is done once. It speaks the protocol of transformers' cache layers.

    Attributes:
        tensors: what is held. Padding counts as a token, but leaves nothing in it.
        seen: tokens per row that have passed.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen = 0

    def write(self, tensors: Mapping[str, Tensor], count: int) -> None:
        """Replace what is held, after ``count`` further tokens.

        A tensor that is a window into a larger one is copied: else the larger one would be kept alive unseen.
        """
        self.tensors = {name: _own(tensor) for name, tensor in tensors.items()}
        self.seen += count
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of storage held."""
        return nbytes_of(self.tensors.values())

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first pass."""
        return next((tensor.shape[0] for tensor in self.tensors.values()), -1)

    def fork(self) -> Self:
        """An independent copy."""
        twin = type(self)()
        twin.write(self.tensors, self.seen)
        twin.map(torch.clone)
        return twin

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by a function of it."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}

    # What transformers asks of a cache layer ------------------------------------------------------------------

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is held before the first pass."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise InputError("the state of a VestigeLM is written by its own layers; it serves no other model")

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]  # before 5.17 a tensor
        return self.seen + count, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name of get_max_length before 5.17
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.tensors = {}
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def crop(self, *args: Any) -> None:
        raise InputError("what a state has taken in cannot be taken back; fork it before trying something out")


def nbytes_of(tensors: Any) -> int:
    """Bytes of the storages behind tensors, each counted once and whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _own(tensor: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # storages cannot be looked at then
        return tensor.clone()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()
