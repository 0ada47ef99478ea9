"""What the scripts of this folder share: time and memory of a call, layers at equal sizes, rows that may fail."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, Sheet, here

from vestige.core.registry import registry
from vestige.layers.footprint import footprint
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer, MixerLayer
from vestige.layers.place import Place
from vestige.layers.state import LayerState
from vestige.models.blocks import names_of

__all__ = [
    "Clock",
    "Sheet",
    "Watch",
    "attempt",
    "built",
    "every_mixer",
    "grows",
    "here",
    "run_whole",
    "settings_of",
    "settle",
]

WIDE = 64  # heads wider than this make too many features of pairs of channels; powers of channels are taken then


class Watch:
    """Times calls: one to warm up, then as many as fit into some seconds, at least one."""

    def __init__(self, device: str, repeats: int, cap: float) -> None:
        self.device, self.repeats, self.cap = device, repeats, cap

    def __call__(self, function: Callable[[], Any]) -> float:
        """Median milliseconds of a call, from its start to its last kernel's end."""
        spans: list[float] = []
        self._once(function)
        while len(spans) < self.repeats and (not spans or sum(spans) + spans[-1] <= self.cap):
            spans.append(self._once(function))
        return 1e3 * statistics.median(spans)

    def both(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
        """The forward pass; forward and backward together; and on CUDA the bytes that these take at their peak."""

        with torch.no_grad():
            found = {"forward_ms": self(function)}
            slope = torch.ones_like(function())

        def there_and_back() -> None:
            torch.autograd.grad(function(), leaves, slope, allow_unused=True)

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found["both_ms"] = self(there_and_back)
        if self.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        return found

    def _once(self, function: Callable[[], Any]) -> float:
        settle(self.device)
        begin = time.perf_counter()
        function()
        settle(self.device)
        return time.perf_counter() - begin


def settle(device: str) -> None:
    """Wait for what was begun."""
    if device == "cuda":
        torch.cuda.synchronize()


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it could not be. Where the device is lost the script ends; another call goes on."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # whatever goes wrong with one mixer, the others are measured
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def every_mixer() -> list[str]:
    """Names of all registered mixers, those that take many small steps later, those with weights per token last."""

    def burden(name: str) -> tuple[bool, bool, str]:
        mixer: Any = registry.load(name)()
        return hasattr(mixer, "by_block") and name != "miras", hasattr(mixer, "refresh"), name

    return sorted(names_of(Mixer), key=burden)


def settings_of(name: str, heads: int, size: int) -> dict[str, Any]:
    """What is not at its default: heads of equal number, and features that are not too many for wide heads."""
    mixer: Any = registry.load(name)()
    changes: dict[str, Any] = {}
    if getattr(mixer, "feature", None) == "polynomial" and size // heads > WIDE:
        changes["feature"] = "powers"
    if hasattr(mixer, "state") and hasattr(mixer, "head_dim"):  # a state-space model, whose heads are its own
        changes |= {"expand": 1.0, "head_dim": size // heads}
    return changes


def built(name: str, heads: int, dim: int, context: int, device: str, dtype: torch.dtype) -> MixerLayer:
    """A layer of so many heads of a width, in the middle of a model."""
    size = heads * dim
    mixer: Any = registry.load(name)()
    place = Place(hidden_size=size, heads=heads, context=context, index=1, layers=4)
    return mixer.replace(**settings_of(name, heads, size)).build(place).to(device, dtype)


def grows(name: str) -> bool:
    """Whether a mixer holds more with every token: beyond its window, between the same places of its blocks."""
    mixer: Any = registry.load(name)()
    mixer = mixer.replace(**settings_of(name, heads=2, size=16))
    return footprint(mixer, Place(hidden_size=16, heads=2), tokens=260, further=64).per_token > 0


def run_whole(layer: MixerLayer, x: Tensor, state: LayerState | None = None) -> Tensor:
    """Tokens through a layer, after those that a state has seen."""
    past = 0 if state is None else state.seen
    return layer(x, Layout.of(x.shape[0], x.shape[1], device=x.device, past=past), state)
