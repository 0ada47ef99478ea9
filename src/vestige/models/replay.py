"""Single tokens by a captured CUDA graph, where a model holds its past in tensors that keep their sizes.

A step of a recurrent layer is a few small kernels, which wait for Python more than they work. Captured once, they are
replayed by one launch. The graph reads and writes the same memory every time: a state that is decoded so has its
tensors there, and is moved out of it when another one comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.core import capture

if TYPE_CHECKING:
    from vestige.models.lm import VestigeLM
    from vestige.models.state import VestigeState

__all__ = ["Replay"]

Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class Replay:
    """The captured steps of one model, by the sizes of what is held. A copy of it has none."""

    def __init__(self) -> None:
        self._steps: dict[Shapes, _Step | None] = {}
        self._parameters: list[Tensor] | None = None
        self._weights: list[int] = []
        self._last: Shapes = ()

    def __reduce__(self) -> tuple[type[Replay], tuple[()]]:
        return Replay, ()

    def step(
        self,
        model: VestigeLM,
        input_ids: Int[Tensor, "batch 1"],
        state: VestigeState,
        attention_mask: Int[Tensor, "batch all"] | None,
        position_ids: Int[Tensor, "batch 1"] | None,
    ) -> Float[Tensor, "batch 1 vocabulary"] | None:
        """The logits of the next token, the state brought up to date; ``None``: the step is to be run as any other.

        That is so on the CPU, under autocast or where a gradient may be wanted; where what is held grows; and where
        there is padding among the tokens that a window holds.
        """
        if not _plain(model, input_ids, state):
            return None
        if attention_mask is not None and attention_mask.shape != (len(input_ids), state.seen + 1):
            return None
        step = self._of(model, state)
        if step is None or (attention_mask is not None and not bool(attention_mask[:, -step.reach :].all())):
            return None
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, state)
        return step.run(input_ids, position_ids, state)

    def _of(self, model: VestigeLM, state: VestigeState) -> _Step | None:
        """The step for states of these sizes, captured where it is not yet."""
        if self._parameters is None:
            self._parameters = list(model.parameters())
        weights = [parameter.data_ptr() for parameter in self._parameters]
        if weights != self._weights:
            self._weights, self._steps = weights, {}
        shapes = _shapes(state)
        if shapes not in self._steps:
            if shapes != self._last:  # sizes that are new may still grow
                self._last = shapes
                return None
            with torch.inference_mode(False), torch.no_grad():
                self._steps[shapes] = _Step.of(model, state)
        return self._steps[shapes]


class _Step:
    """One captured step, with the memory that it reads and writes."""

    logits: Tensor
    replay: Callable[[], None]

    def __init__(self, state: VestigeState) -> None:
        self.held = [{name: tensor.clone() for name, tensor in layer.tensors.items()} for layer in state.layers]
        some = next(iter(self.held[0].values()))
        self.input_ids = torch.zeros(some.shape[0], 1, dtype=torch.long, device=some.device)
        self.position_ids = torch.zeros_like(self.input_ids)
        self.reach = 1 + max((held["keys"].shape[2] for held in self.held if "keys" in held), default=0)
        self._owner: weakref.ref[VestigeState] | None = None

    @classmethod
    def of(cls, model: VestigeLM, state: VestigeState) -> _Step | None:
        """The step from states of these sizes; ``None`` where it changes them, or waits for the device."""
        step, seen = cls(state), state.seen

        def after() -> tuple[Tensor, VestigeState]:
            start = model.new_state()
            for layer, held in zip(start.layers, step.held, strict=True):
                layer.write(held, seen)
            read = model.model(step.input_ids, position_ids=step.position_ids, past_key_values=start, use_cache=True)
            return model.lm_head(read.last_hidden_state), start

        def once() -> None:
            step.logits, state = after()
            step._write(state)

        if _shapes(after()[1]) != _shapes(state) or capture.waits(after):
            return None
        step.replay = capture.captured(once, step.input_ids.device).replay
        return step

    def run(self, input_ids: Tensor, position_ids: Tensor, state: VestigeState) -> Float[Tensor, "batch 1 vocabulary"]:
        """One token further."""
        self._adopt(state)
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        self.replay()
        for layer in state.layers:
            layer.seen += 1
        return self.logits.clone()

    def _write(self, state: VestigeState) -> None:
        """Put what a step left over what was there before."""
        places = {tensor.data_ptr() for held in self.held for tensor in held.values()}
        for layer, held in zip(state.layers, self.held, strict=True):
            new = {name: t.clone() if t.data_ptr() in places else t for name, t in layer.tensors.items()}
            for name, tensor in held.items():
                tensor.copy_(new[name])

    def _adopt(self, state: VestigeState) -> None:
        """Take a state's tensors into the memory of the graph; what was there of another one becomes its own."""
        before = None if self._owner is None else self._owner()
        if before is not None and before is not state:
            for layer, held in zip(before.layers, self.held, strict=True):
                for name, tensor in layer.tensors.items():
                    if name in held and tensor.data_ptr() == held[name].data_ptr():
                        layer.tensors[name] = tensor.clone()
        for layer, held in zip(state.layers, self.held, strict=True):
            for name, tensor in layer.tensors.items():
                if tensor is not held[name]:
                    held[name].copy_(tensor)
            layer.tensors = dict(held)
        self._owner = weakref.ref(state)


def _plain(model: VestigeLM, input_ids: Tensor, state: VestigeState) -> bool:
    """Whether this is a step that may be captured: one token after others, on CUDA, of which no gradient is wanted."""
    if input_ids.shape[1] != 1 or not _on_cuda(input_ids) or model.training or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(input_ids.device.type):
        return False
    held = [tensor for layer in state.layers for tensor in layer.tensors.values()]
    rows, places = state.batch_size, {tensor.device for tensor in held}
    return all(layer.tensors for layer in state.layers) and rows == len(input_ids) and places == {input_ids.device}


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _shapes(state: VestigeState) -> Shapes:
    return tuple(
        (f"{index}.{name}", tuple(tensor.shape), tensor.dtype)
        for index, layer in enumerate(state.layers)
        for name, tensor in layer.tensors.items()
    )


def _positions(input_ids: Tensor, attention_mask: Tensor | None, state: VestigeState) -> Int[Tensor, "batch 1"]:
    """Where the token stands in its text."""
    if attention_mask is None:
        return torch.full_like(input_ids, state.seen)
    return attention_mask.sum(1, keepdim=True) - 1
