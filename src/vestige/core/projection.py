"""One linear map of a block, wherever the architecture keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vestige.errors import UnsupportedModelError

__all__ = ["Projection"]


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map: a module of its own, or some of the output features of a fused one.

    Calling it, on inputs (..., in_features), gives just what the model computes, (..., out_features),
    with adapters and hooks; for a fused module that is the whole of its work.

    Attributes:
        module: the module that computes it; hooks and replacements go there.
        selected: the module's output features that belong to this map, in order; None for all.
    """

    module: nn.Module
    selected: slice | torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._select(self.module(x), dim=-1)

    @property
    def fused(self) -> bool:
        """Whether the module computes other maps too."""
        return self.selected is not None

    @property
    def rows(self) -> torch.Tensor:
        """Indices (out_features,) of this map's features among those of the module."""
        every = torch.arange(_out_features(self.module))
        return every if self.selected is None else every[self.selected]

    @property
    def out_features(self) -> int:
        return len(self.rows)

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out_features, in_features): a view of the module's where the layout allows, else a copy.

        Raises:
            UnsupportedModelError: the module does not hold it as one plain matrix (quantised, or an unmerged adapter).
        """
        return self._select(_whole_weight(self.module))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias (out_features,), or None."""
        bias = _plain(self.module).bias
        return None if bias is None else self._select(bias)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter in which the weight is stored, with whatever else it is fused with, in the module's layout.

        Raises:
            UnsupportedModelError: as :attr:`weight`.
        """
        return _plain(self.module).weight

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """What :attr:`stored` must become for this map to have another weight.

        As in ``patch.parameter(projection.stored, projection.merged(weight))``.

        Args:
            weight: (out_features, in_features).
        """
        whole = _whole_weight(self.module).detach().clone()
        whole[self.rows.to(whole.device)] = weight.to(whole)
        return whole.T if isinstance(_plain(self.module), Conv1D) else whole

    def _select(self, whole: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This map's part of something that the whole module has along a dimension."""
        if self.selected is None:
            return whole
        if isinstance(self.selected, slice):
            first, end, _ = self.selected.indices(whole.shape[dim])
            return whole.narrow(dim, first, end - first)
        return whole.index_select(dim, self.selected.to(whole.device))


def _out_features(module: nn.Module) -> int:
    inner = getattr(module, "base_layer", None)  # an adapter of PEFT
    if inner is not None:
        return _out_features(inner)
    return module.nf if isinstance(module, Conv1D) else module.out_features


def _plain(module: nn.Module) -> nn.Module:
    """The layer that holds the matrix which the module multiplies by."""
    inner = getattr(module, "base_layer", None)  # an adapter of PEFT
    if inner is not None:
        if module.active_adapters and not module.merged and not module.disable_adapters:
            raise UnsupportedModelError(
                f"a {type(module).__name__} adds an adapter to its weight; merge it first, with merge_adapter()"
            )
        return _plain(inner)
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2
    if not matrix or not isinstance(module, nn.Linear | Conv1D):
        raise UnsupportedModelError(f"{type(module).__name__} holds no plain weight matrix; load the model unquantised")
    return module


def _whole_weight(module: nn.Module) -> torch.Tensor:
    """The module's weight as (out_features, in_features)."""
    module = _plain(module)
    return module.weight.T if isinstance(module, Conv1D) else module.weight
