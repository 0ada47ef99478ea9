"""Low-rank changes of linear maps, put there and taken away again: what several methods learn with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from vestige.core.patch import Patch

__all__ = ["Adapters"]


class Adapters:
    """``W + scale B A`` for some linear maps of a model. A is drawn, B is zero; nothing else of the model is trained.

    The sum is made and then used as W is: so a step takes few operations more than one in which W itself is learnt.
    Products with A and B beside that with W are two more forwards and four backwards, for each map, which takes a small
    model half of its time.

    Args:
        model: any.
        maps: linear maps of it (transformers' ``Conv1D`` too), each once.
        rank: of each product.
        scale: by which it is multiplied.
        draw: random numbers; A is even within 1 / sqrt(inputs).
        owner: the method, for errors.
    """

    def __init__(
        self, model: nn.Module, maps: Sequence[nn.Module], rank: int, scale: float, draw: torch.Generator, owner: str
    ) -> None:
        self.scale, self.on = scale, True
        self._pairs: dict[nn.Module, list[nn.Parameter]] = {}
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for parameter in self._flags:
            parameter.requires_grad_(False)
        self._patch = Patch(model, owner)
        for linear in maps:
            weight: Tensor = linear.weight  # type: ignore[assignment]
            outputs, inputs = reversed(weight.shape) if isinstance(linear, Conv1D) else weight.shape
            even = torch.rand(rank, inputs, generator=draw, dtype=torch.float64)
            first, second = ((2 * even - 1) * inputs**-0.5).to(weight), weight.new_zeros(outputs, rank)
            self._pairs[linear] = [nn.Parameter(first), nn.Parameter(second)]
            for name, value in zip(("low_rank_a", "low_rank_b"), self._pairs[linear], strict=True):
                self._patch.attribute(linear, name, value)
            self._patch.attribute(linear, "forward", partial(self._forward, linear))

    def _forward(self, linear: nn.Module, x: Tensor) -> Tensor:
        weight = self._sum(linear)
        return F.linear(x, weight.T if isinstance(linear, Conv1D) else weight, linear.bias)  # type: ignore[arg-type]

    def _sum(self, linear: nn.Module) -> Tensor:
        weight: Tensor = linear.weight  # type: ignore[assignment]
        if not self.on:
            return weight
        first, second = self._pairs[linear]
        left, right = (first.T, second.T) if isinstance(linear, Conv1D) else (second, first)
        # In 16 bits a small change is lost beside W.
        kind = weight.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return torch.addmm(weight, left, right, alpha=self.scale)

    def matrices(self, linear: nn.Module) -> list[nn.Parameter]:
        """A (rank, in) and B (out, rank)."""
        return self._pairs[linear]

    @torch.no_grad()
    def merged(self, linear: nn.Module) -> Tensor:
        """The weight with the product added to it, in the layout in which the map holds it."""
        return self._sum(linear)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model without the products inside the block."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def remove(self) -> None:
        """Take them away, and give all parameters their flags back; a second call does nothing."""
        self._patch.undo()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._flags = {}
