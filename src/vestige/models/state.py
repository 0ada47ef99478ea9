"""The state of a :class:`~vestige.models.lm.VestigeLM`: everything that it holds of what it has read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers.cache_utils import Cache

from vestige.core.files import write_whole
from vestige.errors import InputError
from vestige.layers.state import LayerState, nbytes_of

if TYPE_CHECKING:
    import torch

    from vestige.models.config import VestigeConfig

__all__ = ["VestigeState"]


class VestigeState(Cache):
    """One transformers cache for all blocks: keys and values that grow, windows that roll, memories that stay.

    Pass it as ``past_key_values``; every pass brings it up to date::

        state = model.new_state()
        model(first, past_key_values=state)
        branch = state.fork()
        state.save("after-first.safetensors")

    Args:
        config: of the model.
        signature: of the config, where it is known: a model that is compiled does not read its config again.

    Attributes:
        layers: one :class:`~vestige.layers.state.LayerState` per block.
        signature: of the config that it belongs to.
    """

    layers: list[LayerState]

    def __init__(self, config: VestigeConfig, signature: str | None = None) -> None:
        super().__init__(layers=[LayerState() for _ in range(config.num_hidden_layers)])
        self.signature = config.signature if signature is None else signature

    @property
    def seen(self) -> int:
        """Tokens per row that have passed, padding included."""
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, counted once where tensors share it."""
        return nbytes_of(tensor for layer in self.layers for tensor in layer.tensors.values())

    @property
    def nbytes_by_layer(self) -> tuple[int, ...]:
        """Bytes of storage that each block holds."""
        return tuple(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first pass."""
        return max(layer.batch_size for layer in self.layers)

    def check(self, signature: str, layers: int) -> None:
        """Refuse to serve another model.

        Raises:
            InputError: the signature of the model's config is not that of the state.
        """
        if self.signature != signature:
            raise InputError(
                f"the state belongs to a model of other blocks or sizes ({self.signature}, {len(self.layers)} layers) "
                f"than this one ({signature}, {layers} layers)"
            )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Replace every tensor by a function of it, in place."""
        for layer in self.layers:
            layer.map(change)
        return self

    def fork(self) -> Self:
        """An independent copy, to try something out from here."""
        twin = type(self).__new__(type(self))
        Cache.__init__(twin, layers=[layer.fork() for layer in self.layers])
        twin.signature = self.signature
        return twin

    def detach(self) -> Self:
        """Cut the state off from the graph that led to it, for training over segments; in place."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move every tensor, as ``Tensor.to``; in place. Only a device makes sense: types are the layers' own."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file."""
        from safetensors.torch import save

        tensors = {
            f"{index}.{name}": tensor.detach().contiguous()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors.items()
        }
        seen = json.dumps([layer.seen for layer in self.layers])
        write_whole(path, save(tensors, metadata={"signature": self.signature, "seen": seen}))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: VestigeConfig, device: str | torch.device = "cpu"
    ) -> VestigeState:
        """Read a state.

        Raises:
            InputError: there is no such file, it is not one of a state, or the state belongs to another config.
        """
        from safetensors import SafetensorError, safe_open

        state = cls(config)
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if "signature" not in metadata:
                    raise InputError(f"{os.fspath(path)!r} holds no state of a VestigeLM")
                due, state.signature = state.signature, metadata["signature"]
                state.check(due, config.num_hidden_layers)
                seen = json.loads(metadata["seen"])
                for index, layer in enumerate(state.layers):
                    prefix = f"{index}."
                    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
                    tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
                    if names:
                        layer.write(tensors, seen[index])
        except (OSError, SafetensorError) as error:
            raise InputError(f"no state can be read from {os.fspath(path)!r}: {error}") from error
        return state

    # What transformers asks of a cache ------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return self.layers[layer_idx].seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)
