"""What claims about memories that learn share: tell one pairs of keys and values, and ask it for them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.ops.learning.engine import Lesson, learn
from vestige.layers.place import Place

__all__ = ["answers", "echo", "error", "least_error", "pairs", "sees_beyond"]


def pairs(count: int, dim: int, seed: int) -> tuple[Float[Tensor, "count dim"], Float[Tensor, "count dim"]]:
    """Random keys of length one, and random values of about that length, in float64."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return keys / keys.norm(dim=-1, keepdim=True), values * dim**-0.5


@torch.no_grad()
def answers(
    mixer: Any,
    keys: Float[Tensor, "count dim"],
    values: Float[Tensor, "count dim"],
    seed: int,
    *,
    asked: Float[Tensor, "asked dim"] | None = None,
    rate: float | Float[Tensor, " count"] = 0.1,
    kept: float = 1.0,
    momentum: float = 0.0,
    step: float = 1.0,
    bound: float = 1.0,
) -> Float[Tensor, "asked dim"]:
    """What the memory of an untrained layer answers after it was told pairs, one per token, with fixed gates.

    Args:
        asked: the keys that are asked for; default: all that were told.
        rate, kept, momentum, step, bound: the gates, see :class:`~vestige.layers.ops.learning.engine.Lesson`.
    """
    asked = keys if asked is None else asked
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = mixer.replace(heads=1).build(Place(hidden_size=keys.shape[1])).double()
    told, more = len(keys), len(asked)

    def gate(while_told: Any, while_asked: float) -> Tensor:
        whole = torch.cat([torch.zeros(told) + while_told, torch.full((more,), while_asked)])
        return whole.double()[None, :, None]

    key = torch.cat([keys, asked])[None, :, None]
    value = torch.cat([values, torch.zeros_like(asked)])[None, :, None]
    gates = {
        "rate": gate(rate, 0.0),
        "decay": gate(kept, 1.0).log(),
        "momentum": gate(max(momentum, 1e-9), 1.0).log(),
        "step": gate(step, 0.0),  # what is asked moves nothing
        "bound": gate(bound, 1.0),
    }
    wanted = {name: gates[name] for name in ("rate", "decay", "step", *layer.gates)}
    return learn(layer.rule, layer.slow(), Lesson(key, key, value, **wanted), {})[0, told:, 0]


def error(found: Tensor, due: Tensor) -> float:
    """The squared difference over the squared size; 1 is what zeros would have."""
    return float((found - due).square().sum() / due.square().sum())


def least_error(
    mixer: Any, told: tuple[Tensor, Tensor], seed: int, rates: tuple[float, ...], times: int = 1, **gates: Any
) -> float:
    """The error of a memory that was told pairs so many times over, at the rate that suits it best."""
    keys, values = told
    return min(
        error(
            answers(mixer, keys.repeat(times, 1), values.repeat(times, 1), seed, asked=keys, rate=rate, **gates), values
        )
        for rate in rates
    )


@torch.no_grad()
def echo(case: LayerCase, mixer: Any, length: int, seed: int) -> float:
    """How much the last output of a layer changes with the first of so many tokens, relative to its size."""
    layer, x = case.layer(mixer), case.x(1, length, seed=seed)
    changed = x.clone()
    changed[:, 0] = -changed[:, 0]
    outputs = [layer(t, Layout.of(1, length, device=t.device))[:, -1] for t in (x, changed)]
    return float((outputs[0] - outputs[1]).norm() / outputs[0].norm())


def sees_beyond(case: LayerCase, size: int) -> Seen:
    """Expect what stood four times so far back to change the layer's output, and not that of attention within a window
    of that size."""
    window = Mixer.from_spec({"name": "sliding-window", "window": size})
    mine, plain = ([echo(case, mixer, 4 * size + 1, seed) for seed in case.seeds] for mixer in (case.fitted, window))
    seen = {"change of the output": mine, "of attention within a window": plain}
    expect(min(mine) > 1e-4 and max(plain) == 0, f"nothing is known of what lies beyond: {seen}")
    return seen
