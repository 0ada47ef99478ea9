"""Mixers whose tokens change a state and read it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.core.method import param
from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer, MixerLayer
from vestige.layers.ops.recurrence import Drive, recurrence
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["LinearLayer", "LinearMixer", "Memory", "RecurrentLayer", "RecurrentMixer"]

Memory = dict[str, Tensor]
"""What a layer holds, by name, batch first; empty before the first token."""


class RecurrentMixer(Mixer):
    """Base of mixers with a state of fixed size."""

    chunk: int = param(64, "tokens per chunk of the form for many tokens, a power of two", ge=1)

    def check(self) -> None:
        if self.chunk & (self.chunk - 1):
            raise SpecError(f"{self.name}: parameter 'chunk' is {self.chunk}; allowed: a power of two")


class RecurrentLayer(MixerLayer):
    """Three stages: project the tokens, run the state over them, work what was read into the output.

    The middle one has two forms that compute the same: :meth:`step` for one token and :meth:`chunked` for many.
    """

    @abstractmethod
    def project(self, x: Float[Tensor, "batch length hidden"], layout: Layout, memory: Memory) -> Any:
        """What the tokens do to the state. Short convolutions keep their last inputs in ``memory``.

        Tokens of padding must come out so that they change nothing.
        """

    @abstractmethod
    def chunked(self, inputs: Any, layout: Layout, memory: Memory) -> Tensor:
        """What many tokens read; ``memory`` is brought up to date."""

    @abstractmethod
    def step(self, inputs: Any, layout: Layout, memory: Memory) -> Tensor:
        """The same for a single token."""

    @abstractmethod
    def finish(self, read: Tensor, x: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch length hidden"]:
        """From what was read to the output."""

    def forward(
        self, x: Float[Tensor, "batch length hidden"], layout: Layout, state: LayerState | None = None
    ) -> Float[Tensor, "batch length hidden"]:
        x = layout.blank(x)
        memory = {} if state is None else dict(state.tensors)
        inputs = self.project(x, layout, memory)
        single = x.shape[1] == 1 and layout.starts is None
        read = (self.step if single else self.chunked)(inputs, layout, memory)
        if state is not None:
            state.write(memory, x.shape[1])
        return self.finish(read, x)


class LinearMixer(RecurrentMixer):
    """Base of mixers whose heads each hold a matrix of keys by values that decays and is added to, or corrected."""

    heads: int | None = param(None, "heads; default: the model's", ge=1)

    def check_place(self, place: Place) -> None:
        self.share(place.hidden_size, self.heads or place.heads, "hidden_size")


class LinearLayer(RecurrentLayer):
    """The layer of a mixer that :class:`~vestige.layers.ops.recurrence.Drive` describes: only ``project`` and
    ``finish`` are its own."""

    @abstractmethod
    def project(self, x: Float[Tensor, "batch length hidden"], layout: Layout, memory: Memory) -> Drive: ...

    def chunked(self, inputs: Drive, layout: Layout, memory: Memory) -> Float[Tensor, "batch length heads values"]:
        chunk = self.mixer.chunk  # type: ignore[attr-defined]
        drive = inputs.blanked(layout.valid)
        read, memory["S"] = recurrence(
            drive, memory.get("S"), starts=layout.starts, cu_seqlens=layout.cu_seqlens, chunk=chunk
        )
        return read

    step = chunked  # the engine sees that there is one token
