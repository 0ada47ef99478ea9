"""What a mixer stores, measured: the state that one layer holds after some tokens, and how it grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """What one layer holds for one row of tokens, in float32.

    Attributes:
        nbytes: bytes after the tokens.
        per_token: bytes that each further token adds.
        tensors: shape of each tensor held, by name, without the batch.
    """

    nbytes: int
    per_token: float
    tensors: dict[str, tuple[int, ...]]


@torch.no_grad()
def footprint(mixer: Mixer, place: Place, tokens: int = 500, further: int = 512) -> Footprint:
    """Run a layer over tokens and look at what it holds.

    Args:
        tokens: how many are read at first.
        further: how many after these, to see what each of them adds. What collects tokens in blocks holds more or
            less as a block fills up: a multiple of its size leaves that out.

    Raises:
        SpecError: no tokens; the mixer does not fit the place.
    """
    if tokens < 1 or further < 1:
        raise SpecError(f"footprint: tokens = {tokens}, further = {further}; allowed: at least 1")
    layer, state = mixer.build(place).eval(), LayerState()
    held = []
    for count in (tokens, further):
        layer(torch.zeros(1, count, place.hidden_size), Layout.of(1, count, past=state.seen), state)
        held.append(state.nbytes)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in state.tensors.items()}
    return Footprint(held[0], (held[1] - held[0]) / further, shapes)
