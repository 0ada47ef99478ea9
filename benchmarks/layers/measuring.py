"""What the scripts of this folder share: time and memory of a call, layers at equal sizes, rows that may fail."""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, Sheet, here

from vestige.layers.footprint import footprint
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer, MixerLayer
from vestige.layers.mixers.learning import LearningMixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState
from vestige.models.blocks import names_of, parse_blocks

__all__ = [
    "Clock",
    "Sheet",
    "Watch",
    "arguments",
    "attempt",
    "built",
    "every_mixer",
    "given",
    "grows",
    "here",
    "mixer_of",
    "portable",
    "run_whole",
    "settings_of",
    "settle",
    "still_there",
    "weights_per_token",
]

# Forms that are worth a row beside the one with the defaults: what a memory costs that looks at its errors more rarely.
FORMS = ("titans(refresh=64)", "atlas(by_block=true)", "memora(by_block=true)", "moneta(by_block=true)")
LONG = 30.0  # seconds; a call that takes longer is not repeated
WIDE = 64  # heads wider than this make too many features of pairs of channels; powers of channels are taken then


def arguments(description: str | None, cap: str) -> argparse.ArgumentParser:
    """What every script of this folder is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cap", type=float, help=cap)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--minutes", type=float, help="after which no further row is begun")
    return parser


def given(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What it was told, and what follows at once: the seed, and the threads."""
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    return args


class Watch:
    """Times calls: one to warm up, for which memory is asked for, then as many as fit into some seconds, at least one.
    What takes very long is called once, unless its kernels may have had to be compiled (``warm`` says that they have
    been)."""

    def __init__(self, device: str, repeats: int, cap: float) -> None:
        self.device, self.repeats, self.cap, self.warm = device, repeats, cap, device == "cpu"

    def __call__(self, function: Callable[[], Any]) -> float:
        """Median milliseconds of a call, from its start to its last kernel's end."""
        spans: list[float] = []
        first = self._once(function)
        if self.warm and first > LONG:
            return 1e3 * first
        while len(spans) < self.repeats and (not spans or sum(spans) + spans[-1] <= self.cap):
            spans.append(self._once(function))
        return 1e3 * statistics.median(spans)

    def both(self, function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, Any]:
        """The forward pass; forward and backward together, or why not; and on CUDA the bytes of these at their peak."""

        with torch.no_grad():
            found: dict[str, Any] = {"forward_ms": self(function)}
            slope = torch.ones_like(function())

        def there_and_back() -> None:
            torch.autograd.grad(function(), leaves, slope, allow_unused=True)

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        backward = attempt(lambda: {"both_ms": self(there_and_back)})
        if "error" in backward:
            return {**found, "both_ms": None, "both_error": backward["error"]}
        found |= backward
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
    """What was measured, or why it could not be."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # whatever goes wrong with one mixer, the others are measured
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"[:200]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def still_there(device: str) -> None:
    """End the script where the device is lost, as after a kernel that went astray; another call goes on."""
    try:
        settle(device)
    except RuntimeError as error:
        raise SystemExit(f"the device is lost: {error}") from error


def every_mixer() -> list[str]:
    """All registered mixers, and forms of some: those that take many small steps later, those with weights per token
    last. Names are read as blocks of a model are."""

    def burden(name: str) -> tuple[bool, bool, str]:
        return weights_per_token(name), hasattr(plain(name), "refresh"), name

    return sorted([*names_of(Mixer), *FORMS], key=burden)


def weights_per_token(name: str) -> bool:
    """Whether every token has a memory's weights worked out for itself."""
    mixer: Any = plain(name)
    if not isinstance(mixer, LearningMixer):
        return False
    rule = mixer.rule()
    return not rule.by_block and (bool(rule.muon) or not rule.retention.linear)


def plain(name: str) -> Mixer:
    """The mixer that a text names, such as ``titans(refresh=64)``."""
    return parse_blocks(name)[0][0].mixer


def settings_of(name: str, heads: int, size: int) -> dict[str, Any]:
    """What else is not at its default: heads of equal number, and features that are not too many for wide heads."""
    mixer: Any = plain(name)
    if getattr(mixer, "feature", None) == "polynomial" and size // heads > WIDE:
        return {"feature": "powers"}
    if mixer.name == "mamba2":  # the number of its heads follows from their width
        return {"expand": 1.0, "head_dim": size // heads}
    return {}


def mixer_of(name: str, heads: int, size: int) -> Any:
    """The mixer at these sizes."""
    return plain(name).replace(**settings_of(name, heads, size))


def built(name: str, heads: int, dim: int, context: int, device: str, dtype: torch.dtype) -> MixerLayer:
    """A layer of so many heads of a width, in the middle of a model."""
    place = Place(hidden_size=heads * dim, heads=heads, context=context, index=1, layers=4)
    return mixer_of(name, heads, heads * dim).build(place).to(device, dtype)


def grows(name: str) -> bool:
    """Whether a mixer holds more with every token: beyond its window, between the same places of its blocks."""
    return footprint(mixer_of(name, 2, 16), Place(hidden_size=16, heads=2), tokens=260, further=64).per_token > 0


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """No kernels but PyTorch's."""
    gates = [
        (module, gate)
        for name, module in sys.modules.items()
        for gate in ("has_kernels", "serves")
        if name.startswith("vestige.layers.ops.") and hasattr(module, gate)
    ]
    with contextlib.ExitStack() as stack:
        for module, gate in gates:
            stack.enter_context(mock.patch.object(module, gate, lambda *_: False))
        yield


def run_whole(layer: MixerLayer, x: Tensor, state: LayerState | None = None) -> Tensor:
    """Tokens through a layer, after those that a state has seen."""
    past = 0 if state is None else state.seen
    return layer(x, Layout.of(x.shape[0], x.shape[1], device=x.device, past=past), state)
