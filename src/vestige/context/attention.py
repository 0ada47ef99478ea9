"""Attention over a cache from which entries are missing.

While a policy is attached, the model's attention modules call :func:`attend`. It computes what the
model's own attention would over the entries that are held, lets the policy see the queries, and drops
what the policy gives up. Outside a pass with a kept cache (training, no cache) it is the model's own
attention, unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vestige.context.ragged import RaggedLayer
from vestige.context.ragged_attention import StandIn, attend_ragged
from vestige.errors import UnsupportedModelError
from vestige.layers.ops.attention_mass import attention_mass, capped, grouped, visible, within

if TYPE_CHECKING:
    from vestige.context.layer import KeptLayer, Step
    from vestige.context.policy import CachePolicy

__all__ = ["Look", "Reading", "attend", "everything", "readable"]

QUERY_BLOCK = 1024  # queries attended at once where a mask must be written out


def attend(
    module: torch.nn.Module,
    query: Tensor,
    layer: KeptLayer,
    *,
    scaling: float,
    policy: CachePolicy,
    step: Step,
    watchers: list[Callable[..., None]],
    softcap: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend from ``query (batch, heads, count, dim)`` to a layer's entries, then drop what the budget does not allow.

    Returns:
        ``(batch, count, heads, dim)`` and ``None`` in the place of attention weights.

    Raises:
        UnsupportedModelError: the model adds learned sink logits or a position bias to its attention.
    """
    for name in ("s_aux", "position_bias"):
        if unused.get(name) is not None:
            raise UnsupportedModelError(f"attention with {name!r} is not supported by cache policies")
    if watchers:
        entries = layer.entries
        for watcher in watchers:
            watcher(layer.index, query, entries.keys, entries.positions, scaling)
    slides = sliding_window is not None
    if sliding_window is not None and layer.seen <= sliding_window:
        sliding_window = None
    policy.present(layer, step)
    places = None if sliding_window is None else policy.places(layer)
    look = Look(query, scaling, softcap, sliding_window, places, slides)
    one = attend_ragged if isinstance(layer, RaggedLayer) else _attend_one
    plain = functools.partial(one if step.decoding else _attend_chunk, module, look, layer, policy, step)
    output = policy.respond(layer, look, step, plain)
    if not step.decoding or policy.needs_queries:
        entries = layer.entries
        policy.observe(entries, look, step)
        entries.commit()
    if not step.decoding:
        layer.settle(step)
    return output, None


def readable(layer: KeptLayer, look: Look, step: Step) -> Tensor | None:
    """``(batch, kv_heads, slots)`` entries that a token being decoded may see; ``None`` for all slots."""
    valid = layer.valid()
    if look.window is not None:
        assert look.places is not None
        near = look.places > step.rows(look.query.device) - 1 - look.window
        valid = near if valid is None else valid & near
    return valid


def _attend_one(
    module: torch.nn.Module, look: Look, layer: KeptLayer, policy: CachePolicy, step: Step
) -> Float[Tensor, "batch 1 heads dim"]:
    """One token per row: the attention weights are few, so they are made once and serve the output and the score."""
    query, valid = look.query, readable(layer, look, step)
    if not policy.needs_attention and look.softcap is None:
        mask = (
            None if valid is None else valid[:, :, None, :].repeat_interleave(query.shape[1] // valid.shape[1], dim=1)
        )
        return sdpa_attention_forward(module, query, layer.keys, layer.values, mask, scaling=look.scaling)[0]
    output, share = everything(layer, look, step).attend(look)
    if policy.needs_attention:
        policy.receive(layer, share.squeeze(3), step)
    return output


def _attend_chunk(
    module: torch.nn.Module, look: Look, layer: KeptLayer, policy: CachePolicy, step: Step
) -> Float[Tensor, "batch count heads dim"]:
    """Many tokens per row: flash attention where the mask is plainly causal, else block after block of queries."""
    query, scaling, softcap, window = look.query, look.scaling, look.softcap, look.window
    every_key, every_value = layer.keys, layer.values
    count, entries = query.shape[2], layer.slots
    valid, stand_in = layer.valid(), StandIn.of(policy, layer, look)
    if count == entries and valid is None and window is None and softcap is None:
        return sdpa_attention_forward(module, query, every_key, every_value, None, scaling=scaling, is_causal=True)[0]
    group = query.shape[1] // every_key.shape[1]
    blocks = []
    for first in range(0, count, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, count)
        shown = entries - count + last
        mask = visible(first, last, count, entries, query.device)[None, None]
        if window is not None:
            assert look.places is not None
            mask = mask & within(look.places, first, last, count, window)
        if valid is not None:
            mask = mask & valid[:, :, None, :shown]
        rows, keys, values = query[:, :, first:last], every_key[:, :, :shown], every_value[:, :, :shown]
        if softcap is not None:
            blocks.append(Reading(((rows, keys),), values, mask).attend(look)[0])
        else:
            if mask.shape[1] > 1:
                mask = mask.repeat_interleave(group, dim=1)
            if stand_in is not None:
                keys, values, mask = stand_in.before(keys, values, mask, group)
            blocks.append(sdpa_attention_forward(module, rows, keys, values, mask, scaling=scaling)[0])
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


@dataclass(frozen=True)
class Look:
    """How the queries of a chunk looked at a layer's entries: what a policy is given to rank the entries by.

    Attributes:
        query: ``(batch, heads, count, dim)``.
        scaling, softcap, window: of the model's attention.
        places: where the entries stand as far as a window goes, ``(batch, kv_heads, slots)``; given with one.
        slides: whether the layer has a window, be the text so far within it or not.
    """

    query: Tensor
    scaling: float
    softcap: float | None
    window: int | None
    places: Tensor | None = None
    slides: bool = False

    def mass(self, layer: KeptLayer, weights: Tensor, step: Step) -> Tensor:
        """Attention that each entry received, ``(batch, kv_heads, slots)``; see :func:`attention_mass`.

        ``weights`` ``(count,)`` or ``(batch, count)`` are those of the last queries of the chunk (all, or fewer);
        padding weighs nothing whatever they say.
        """
        late = slice(-weights.shape[-1], None)
        if step.positions is not None:
            weights = weights * (step.positions[:, late] >= 0)
        return attention_mass(
            self.query[:, :, late],
            layer.keys,
            weights,
            scaling=self.scaling,
            valid=layer.valid(),
            softcap=self.softcap,
            window=self.window,
            positions=self.places,
        )


@dataclass(frozen=True)
class Reading:
    """What queries read, where it is not simply every entry as it stands.

    Attributes:
        parts: keys ``(batch, kv_heads, n, dim)``, each with the queries ``(batch, heads, count, dim)`` that meet them;
            the entries of all parts, one after the other, are what is read.
        values: ``(batch, kv_heads, entries, dim)``, in one piece or several.
        valid: which entries exist, ``(batch, kv_heads, entries)`` or ``(batch, kv_heads, count, entries)``; ``None``
            for all. Leading ones may be 1.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    values: Tensor | tuple[Tensor, ...]
    valid: Tensor | None = None

    def attend(self, look: Look) -> tuple[Tensor, Tensor]:
        """Output ``(batch, count, heads, dim)``, and the weights that gave it."""
        share = self.weights(look)
        return self.mix(share), share

    def mix(self, share: Tensor) -> Tensor:
        """The output that weights ``(batch, kv_heads, group, count, entries)`` give."""
        values = self.values if isinstance(self.values, tuple) else (self.values,)
        weights = share.to(values[0].dtype).flatten(2, 3).split([part.shape[2] for part in values], dim=3)
        mixed = (w @ part for w, part in zip(weights, values, strict=True))
        output = functools.reduce(torch.add, mixed)
        return output.unflatten(2, share.shape[2:4]).flatten(1, 2).transpose(1, 2)

    def weights(self, look: Look) -> Float[Tensor, "batch kv group count entries"]:
        """Attention weights, float32 (float64 for float64 input); zero where a query may see nothing."""
        products = [_products(query, keys) for query, keys in self.parts]
        logits = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        logits = capped(logits * look.scaling, look.softcap)
        if self.valid is not None:
            valid = self.valid[:, :, None] if self.valid.dim() == 4 else self.valid[:, :, None, None]
            logits = logits.masked_fill(~valid, float("-inf"))
        share = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return share if self.valid is None else share.nan_to_num()


def everything(entries: KeptLayer, look: Look, step: Step) -> Reading:
    """All that one token may see."""
    return Reading(((look.query, entries.keys),), entries.values, readable(entries, look, step))


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """``(batch, kv_heads, group, queries, keys)``."""
    rows = grouped(query, keys.shape[1])
    return (rows.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, rows.shape[2:4])
