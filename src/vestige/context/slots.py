"""Decoding at the speed of memory: fixed slots, one captured graph for the whole step (CUDA).

With a budget in tokens every shape of a decoding step is fixed, so the step is captured once as a CUDA graph
and replayed for each token: no Python between the kernels. Each layer's entries stand in a table of slots
(:mod:`vestige.layers.ops.decode_triton`); the layer of the cache goes on owning them, as views of the table.

A graph is made once for each batch size and capacity of an attachment, and serves every later cache of that
shape: its tables take over the entries of the cache that is being decoded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vestige.context.cache import KeptCache
from vestige.context.layer import EMPTY, KeptLayer
from vestige.core.capture import captured

if TYPE_CHECKING:
    from vestige.context.kept import Kept
    from vestige.context.policy import Evict
    from vestige.layers.ops.decode_triton import SlotTable

__all__ = ["GraphedForward", "SlotStep", "TurnedKeys"]

logger = logging.getLogger(__name__)

ROOM = 768  # slots, at the least, by which a cache that goes on growing is made larger than what it holds
UNIT = 256  # its size is a multiple of this many, so that caches of similar size share a graph


@dataclass
class TurnedKeys:
    """Keys of a layer that are turned on by as many positions as tokens are missing from the cache.

    Attributes:
        came: ``(batch, kv_heads, turned, dim)`` the keys as they came.
        slots: ``(batch, turned)`` where they are held, the same in all heads.
        missing: ``(batch,)`` tokens that a row has seen beyond those that it holds.
    """

    came: Tensor
    slots: Tensor
    missing: Tensor


class SlotStep:
    """What the layers need to know while a step runs over tables of slots."""

    count, decoding = 1, True

    def __init__(
        self, tables: list[SlotTable], seen: Tensor, mode: int, policy: Any, turned: list[TurnedKeys], rotary: Any
    ) -> None:
        self.tables, self.seen, self.mode = tables, seen, mode
        self.carry = policy.carry(1) if mode == 1 else 1.0
        self.sinks = policy.sinks
        self.recent = policy.recent_tokens(policy.budget) if mode else 0
        self.turned = turned
        if turned:
            self.frequencies = torch.tensor(rotary.frequencies, device=seen.device)

    def begin(self) -> None:
        """One token more has been seen; with it, one more may be missing."""
        self.seen.add_(1)
        if self.turned:
            by = torch.maximum(self.seen - self.tables[0].capacity, self.turned[0].missing)
            angle = by[:, None] * self.frequencies
            self.phase = angle.cos(), angle.sin()

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        from vestige.layers.ops.decode_triton import turn_slots, write_slot

        write_slot(self.tables[layer], key, value, self.seen, self.mode)
        if self.turned:
            turn_slots(self.tables[layer], self.turned[layer].came, self.turned[layer].slots, *self.phase)

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        from vestige.layers.ops.decode_triton import attend_slots

        return attend_slots(
            self.tables[layer],
            query,
            self.seen,
            scaling=scaling,
            mode=self.mode,
            carry=self.carry,
            sinks=self.sinks,
            recent=self.recent,
        )


class GraphedForward:
    """The model's forward, with decoding steps that allow it replayed from a graph."""

    def __init__(self, kept: Kept, model: nn.Module) -> None:
        self._kept = weakref.ref(kept)
        self._forward = model.forward
        self._steps: dict[tuple[Any, ...], _GraphedStep] = {}
        self._failed = False

    def wrapped(self) -> Callable[..., Any]:
        """A function with the signature of the forward that it stands for."""

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = self._kept()
            if kept is not None and not args and self._fits(kept, kwargs):
                try:
                    return self._replay(kept, kwargs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    if not self._capturing:
                        raise
                    self._failed = True
                    self._steps.clear()
                    logger.warning(
                        "this model's step cannot be captured as a graph; decoding goes on without: %s", error
                    )
            return self._forward(*args, **kwargs)

        return forward

    _capturing = False

    def _fits(self, kept: Kept, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a decoding step whose shapes stay fixed."""
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if self._failed or not isinstance(cache, KeptCache) or not isinstance(ids, Tensor) or ids.shape[1] != 1:
            return False
        plain = not any(kwargs.get(name) is not None for name in ("inputs_embeds", "labels"))
        plain &= not any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        return (
            plain
            and ids.is_cuda
            and cache.get_seq_length() > 0
            and not torch.is_grad_enabled()
            and not kept._watchers
            and kept.graph_mode(cache) is not None
        )

    def _replay(self, kept: Kept, kwargs: dict[str, Any]) -> Any:
        cache, ids = kwargs["past_key_values"], kwargs["input_ids"]
        mode = kept.graph_mode(cache)
        assert mode is not None
        step = self._step(kept, cache, mode)
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            step.position_ids.fill_(cache.get_seq_length())
        else:
            step.position_ids.copy_(position_ids[:, -1:].expand_as(step.position_ids))
        step.input_ids.copy_(ids)
        step.graph.replay()
        cache.real = [real + 1 for real in cache.real]
        step.real = list(cache.real)
        for layer, table in zip(cache.layers, step.step.tables, strict=True):
            layer.seen += 1
            if mode == 0:
                _view(table, layer, layer.slots + 1)
        kept.cache = cache
        fields = {k: v.clone() if isinstance(v, Tensor) else v for k, v in step.output.items()}
        return type(step.output)(**{**fields, "past_key_values": cache})

    def _step(self, kept: Kept, cache: KeptCache, mode: int) -> _GraphedStep:
        """The graph for a cache, its tables holding the cache's entries."""
        first = cache.layers[0]
        batch = first.keys.shape[0]
        for step in self._steps.values():
            if step.mode == mode and step.holds(cache) and not (mode == 0 and first.slots == step.capacity):
                return step
        if mode == 0:
            held = max(layer.slots for layer in cache.layers)
            capacity = -(-(held + ROOM) // UNIT) * UNIT
        else:
            capacity = int(cast("Evict", cache.policy).budget)  # in tokens, or there is no such mode
        key = (batch, capacity, mode, first.keys.dtype)
        if key in self._steps:
            self._steps[key].adopt(cache)
        else:
            self._capturing = True
            self._steps[key] = _GraphedStep(self._forward, kept, cache, capacity, mode)
            self._capturing = False
        return self._steps[key]


class _GraphedStep:
    """One captured step with the tables that it reads and writes."""

    def __init__(self, forward: Callable[..., Any], kept: Kept, cache: KeptCache, capacity: int, mode: int) -> None:
        self.capacity, self.mode = capacity, mode
        tables = [_take(layer, capacity, mode) for layer in cache.layers]
        if mode:
            cache.padded = True  # slots may be empty from now on
        self._held: weakref.ref[KeptCache] | None = weakref.ref(cache)
        self.real: list[int] = []
        batch, device = cache.layers[0].keys.shape[0], cache.layers[0].device
        self.seen = torch.ones(batch, dtype=torch.int32, device=device)
        turned = [one for layer in cache.layers if (one := cache.policy.turned(layer)) is not None]
        self.step = SlotStep(tables, self.seen, mode, cache.policy, turned, cache.rotary)
        self.input_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        stand_in = kept.new_cache()
        stand_in.slots_step = self.step
        for layer, twin in zip(cache.layers, stand_in.layers, strict=True):
            twin.dtype, twin.device, twin.is_initialized, twin.seen = layer.dtype, layer.device, True, 1
            twin.keys, twin.values = layer.keys[:, :, :1], layer.values[:, :, :1]

        def run() -> Any:
            self.step.begin()
            return forward(
                input_ids=self.input_ids, position_ids=self.position_ids, past_key_values=stand_in, use_cache=True
            )

        def shrink() -> None:
            """With segments of one slot, runs that compile and settle the kernels touch that slot alone."""
            for table in tables:
                table.length.fill_(1)
                table.target.zero_()

        def warm_up() -> None:
            shrink()
            run()
            shrink()

        def keep() -> None:
            self.output = run()

        spoiled = [(flat, table.offset, flat[table.offset]) for table in tables for flat in table.entries()]
        with _made_fast(kept, batch, stand_in):
            self.graph = captured(keep, device, warm_up=warm_up)
        for flat, first_slots, entries in spoiled:
            flat[first_slots] = entries
        self._set_out(cache)

    def holds(self, cache: KeptCache) -> bool:
        """Whether the tables hold this cache's entries, as the last step left them."""
        return self._held is not None and self._held() is cache and self.real == cache.real and self._lies_here(cache)

    def _lies_here(self, cache: KeptCache) -> bool:
        """Whether a cache's entries are those of the tables, whatever was done with them since."""
        return all(
            layer.keys.data_ptr() == table.keys.data_ptr()
            for layer, table in zip(cache.layers, self.step.tables, strict=True)
        )

    def adopt(self, cache: KeptCache) -> None:
        """Move a cache's entries into the tables; a cache that was there before gets copies of its own."""
        before = self._held() if self._held is not None else None
        if before is not None and self._lies_here(before):
            for layer in before.layers:
                layer._rewrite(lambda tensor: tensor.clone())
        for layer, table in zip(cache.layers, self.step.tables, strict=True):
            _fill(table, layer, self.mode)
        if self.mode:
            cache.padded = True
        self._held = weakref.ref(cache)
        self._set_out(cache)

    def _set_out(self, cache: KeptCache) -> None:
        """Set what the step counts by, and choose the slots of the next token."""
        self.real = list(cache.real)
        for layer, ours in zip(cache.layers, self.step.turned, strict=False):
            now = cache.policy.turned(layer)
            for field in ("came", "slots", "missing"):
                getattr(ours, field).copy_(getattr(now, field))
            layer.aside["sinks"] = ours.came
        self.seen.copy_(torch.tensor(cache.real, dtype=torch.int32))
        for layer, table in zip(cache.layers, self.step.tables, strict=True):
            if self.mode == 0:
                table.length.fill_(layer.slots)
                table.target.fill_(layer.slots)
                continue
            table.length.fill_(self.capacity)
            positions = layer._positions(layer.slots)
            real = torch.tensor(cache.real, device=layer.device)[:, None, None] + 1
            rank = (layer.state["mass"] if self.mode == 1 else positions).float()
            spared = (positions < self.step.sinks) | (positions >= real - self.step.recent)
            rank = rank.masked_fill(spared, 3e38).masked_fill(positions == EMPTY, -1.0)
            table.target.copy_(rank.argmin(dim=2).flatten())


@contextlib.contextmanager
def _made_fast(kept: Kept, batch: int, stand_in: KeptCache) -> Iterator[None]:
    """While a step is captured: linear maps of one row read at full speed, small operations fused if asked for.

    The graph keeps the kernels; the model is itself again afterwards.
    """
    from vestige.core.patch import Patch
    from vestige.layers.ops.gemv_triton import linear_of_one, serves

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(Patch(kept.model, f"{kept.policy.name} (capture)"))
        if batch == 1:
            for module in filter(serves, kept.model.modules()):
                patch.attribute(module, "forward", functools.partial(_linear, linear_of_one, module))
        if kept.compile:
            import torch._dynamo as dynamo

            # One compilation serves all blocks only if their index is not taken for a constant.
            stack.enter_context(dynamo.config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=4096))
            stand_in.update = torch.compiler.disable(stand_in.update)  # type: ignore[method-assign]
            for layer in kept.anatomy.layers:
                patch.attribute(layer.block, "forward", torch.compile(layer.block.forward, dynamic=False))
        yield


def _linear(multiply: Callable[..., Tensor], module: nn.Linear, x: Tensor) -> Tensor:
    return multiply(x, module.weight, module.bias)


def _take(layer: KeptLayer, capacity: int, mode: int) -> SlotTable:
    """A table made of a layer's own entries; the layer becomes a view of it."""
    from vestige.layers.ops.decode_triton import SlotTable

    _within(layer, capacity, mode)
    batch, heads, held, _ = layer.keys.shape
    segments = batch * heads

    def widened(tensor: Tensor, empty: int) -> Tensor:
        if held == capacity:
            return tensor.contiguous()
        wide = tensor.new_full((batch, heads, capacity, *tensor.shape[3:]), empty)
        wide[:, :, :held] = tensor
        return wide

    ints = {"dtype": torch.int32, "device": layer.device}
    layer._room = {}
    layer.positions = widened(layer._positions(held), EMPTY)
    layer.keys = widened(layer.keys, 0)
    layer.values = widened(layer.values, 0)
    if mode == 1:
        mass = layer.state.get("mass")
        layer.state["mass"] = widened(
            torch.zeros_like(layer.positions, dtype=torch.float32) if mass is None else mass, 0
        )
    table = SlotTable(
        keys=layer.keys.view(segments * capacity, -1),
        values=layer.values.view(segments * capacity, -1),
        positions=layer.positions.view(-1),
        mass=layer.state["mass"].view(-1) if mode == 1 else None,
        offset=torch.arange(segments, **ints) * capacity,
        length=torch.full((segments,), held, **ints),
        target=torch.zeros(segments, **ints),
        rows=batch,
        kv_heads=heads,
        capacity=capacity,
    )
    _view(table, layer, held if mode == 0 else capacity)
    return table


def _within(layer: KeptLayer, capacity: int, mode: int) -> None:
    """Cut a layer that holds more than its budget, leaving room for the next token."""
    if mode and layer.slots > capacity:
        layer.keep([capacity - 1] * len(layer.cache.real))


def _fill(table: SlotTable, layer: KeptLayer, mode: int) -> None:
    """Copy a layer's entries into a table; the layer becomes a view of it."""
    _within(layer, table.capacity, mode)
    held = layer.slots

    def over(flat: Tensor) -> Tensor:
        return flat.view(table.rows, table.kv_heads, table.capacity, *flat.shape[1:])

    over(table.keys)[:, :, :held] = layer.keys
    over(table.values)[:, :, :held] = layer.values
    positions = over(table.positions)
    positions[:, :, :held] = layer._positions(held)
    positions[:, :, held:] = EMPTY
    if table.mass is not None:
        mass = over(table.mass)
        mass.zero_()
        if "mass" in layer.state:
            mass[:, :, :held] = layer.state["mass"]
        layer.state["mass"] = mass
    _view(table, layer, held if mode == 0 else table.capacity)


def _view(table: SlotTable, layer: KeptLayer, slots: int) -> None:
    """Let a layer's entries be the first slots of its segments."""
    layer._room = {}
    for name in ("keys", "values", "positions"):
        flat = getattr(table, name)
        setattr(layer, name, flat.view(table.rows, table.kv_heads, table.capacity, *flat.shape[1:])[:, :, :slots])
