"""Low-rank matrices beside linear maps, put there by PEFT and taken away again: what several methods learn with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vestige.core.packages import need

__all__ = ["Adapters"]

ADAPTER = "vestige"


class _Outward(nn.Module):
    """From the rank to the outputs, by B (out, rank). PEFT finds it where its own linear map was."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        # The gradients of a map so narrow take a processor three times as long from the transposed view as from a copy.
        return x @ (self.weight.T.contiguous() if x.device.type == "cpu" else self.weight.T)


class Adapters:
    """``W + scale B A`` for some linear maps of a model. A is drawn, B is zero; nothing else of the model is trained.

    Args:
        model: any.
        maps: linear maps of it (transformers' ``Conv1D`` too), each once.
        rank: of each product.
        scale: by which it is multiplied.
        draw: random numbers; A is even within 1 / sqrt(inputs).
        owner: the method, for errors.

    Raises:
        MissingPackageError: PEFT is not installed.
    """

    def __init__(
        self, model: nn.Module, maps: Sequence[nn.Module], rank: int, scale: float, draw: torch.Generator, owner: str
    ) -> None:
        need(owner, "weights", "peft")
        from peft import LoraConfig, LoraModel

        names = {part: name for name, part in model.named_modules()}
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._tuner: Any = None
        config = LoraConfig(r=rank, lora_alpha=1, target_modules=[names[linear] for linear in maps])
        try:
            with torch.random.fork_rng(devices=[]):
                self._tuner = LoraModel(model, config, ADAPTER)
            self.layers: dict[nn.Module, Any] = {linear: model.get_submodule(names[linear]) for linear in maps}
            with torch.no_grad():
                for linear, layer in self.layers.items():
                    layer.scaling[ADAPTER] = scale
                    layer.lora_B[ADAPTER] = _Outward(layer.lora_B[ADAPTER].weight)
                    first, second = self.matrices(linear)
                    even = torch.rand(first.shape, generator=draw, dtype=torch.float64)
                    first.copy_((2 * even - 1) * first.shape[1] ** -0.5)
                    second.zero_()
        except BaseException:
            self.remove()
            raise

    def matrices(self, linear: nn.Module) -> list[nn.Parameter]:
        """A (rank, in) and B (out, rank)."""
        layer = self.layers[linear]
        return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]

    @torch.no_grad()
    def merged(self, linear: nn.Module) -> Tensor:
        """The weight with the product added to it, in the layout in which the map holds it."""
        weight: Any = linear.weight
        return weight.detach() + self.layers[linear].get_delta_weight(ADAPTER)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model without the products inside the block."""
        scales = [layer.scaling[ADAPTER] for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.scaling[ADAPTER] = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(self.layers.values(), scales, strict=True):
                layer.scaling[ADAPTER] = scale

    def remove(self) -> None:
        """Take them away, and give all parameters their flags back; a second call does nothing."""
        if self._tuner is not None:
            self._tuner.unload()
            self._tuner = None
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._flags = {}
