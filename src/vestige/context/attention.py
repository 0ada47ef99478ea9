"""Attention over a cache from which entries are missing.

While a policy is attached, the model's attention modules call :func:`attend`. It computes what the
model's own attention would over the entries that are held, lets the policy see the queries, and drops
what the policy gives up. Outside a pass with a kept cache (training, no cache) it is the model's own
attention, unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vestige.errors import UnsupportedModelError
from vestige.layers.ops.attention_mass import attention_mass, grouped, visible, within

if TYPE_CHECKING:
    from vestige.context.cache import KeptLayer, Step
    from vestige.context.policy import Evict

__all__ = ["Look", "attend"]

QUERY_BLOCK = 1024  # queries attended at once where a mask must be written out


def attend(
    module: torch.nn.Module,
    query: Tensor,
    layer: KeptLayer,
    *,
    scaling: float,
    policy: Evict,
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
    for watcher in watchers:
        watcher(layer.index, query, layer.keys, layer.positions, scaling)
    if sliding_window is not None and layer.seen <= sliding_window:
        sliding_window = None
    policy.present(layer, step)
    if step.decoding:
        output = _attend_one(module, query, layer, scaling, policy, step, softcap, sliding_window)
    else:
        output = _attend_chunk(module, query, layer, scaling, softcap, sliding_window)
        look = Look(query, scaling, softcap, sliding_window)
        policy.observe(layer, look, step)
        if step.allowed is not None:
            layer.keep(step.allowed)
    return output, None


def _attend_one(
    module: torch.nn.Module,
    query: Tensor,
    layer: KeptLayer,
    scaling: float,
    policy: Evict,
    step: Step,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """One token per row: the attention weights are few, so they are made once and serve the output and the score."""
    valid = layer.valid()
    if window is not None:
        positions = layer._positions(layer.slots)
        near = positions > step.rows(query.device) - 1 - window
        valid = near if valid is None else valid & near
    if not policy.needs_attention and softcap is None:
        mask = (
            None if valid is None else valid[:, :, None, :].repeat_interleave(query.shape[1] // valid.shape[1], dim=1)
        )
        return sdpa_attention_forward(module, query, layer.keys, layer.values, mask, scaling=scaling)[0]
    share = _shares(query, layer.keys, scaling, softcap, None if valid is None else valid[:, :, None, None, :])
    output = (share.to(query.dtype).flatten(2, 3) @ layer.values).flatten(1, 2)[:, None]
    if policy.needs_attention:
        policy.receive(layer, share.squeeze(3), step)
    return output


def _attend_chunk(
    module: torch.nn.Module,
    query: Tensor,
    layer: KeptLayer,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Many tokens per row: flash attention where the mask is plainly causal, else block after block of queries."""
    count, entries = query.shape[2], layer.slots
    valid = layer.valid()
    if count == entries and valid is None and window is None and softcap is None:
        return sdpa_attention_forward(module, query, layer.keys, layer.values, None, scaling=scaling, is_causal=True)[0]
    group = query.shape[1] // layer.keys.shape[1]
    blocks = []
    for first in range(0, count, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, count)
        shown = entries - count + last
        mask = visible(first, last, count, entries, query.device)[None, None]
        if window is not None:
            mask = mask & within(layer._positions(entries), first, last, count, window)
        if valid is not None:
            mask = mask & valid[:, :, None, :shown]
        rows, keys, values = query[:, :, first:last], layer.keys[:, :, :shown], layer.values[:, :, :shown]
        if softcap is not None:
            share = _shares(rows, keys, scaling, softcap, mask[:, :, None]).nan_to_num()
            block = (share.to(query.dtype).flatten(2, 3) @ values).unflatten(2, (group, last - first))
            blocks.append(block.flatten(1, 2).transpose(1, 2))
        else:
            if mask.shape[1] > 1:
                mask = mask.repeat_interleave(group, dim=1)
            blocks.append(sdpa_attention_forward(module, rows, keys, values, mask, scaling=scaling)[0])
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


@dataclass(frozen=True)
class Look:
    """How the queries of a chunk looked at a layer's entries: what a policy is given to rank the entries by.

    Attributes:
        query: ``(batch, heads, count, dim)``.
        scaling, softcap, window: of the model's attention.
    """

    query: Tensor
    scaling: float
    softcap: float | None
    window: int | None

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
            positions=None if self.window is None else layer._positions(layer.slots),
        )


def _shares(query: Tensor, keys: Tensor, scaling: float, softcap: float | None, valid: Tensor | None) -> Tensor:
    """Attention weights ``(batch, kv, group, queries, keys)`` in float32 (float64 for float64 input)."""
    rows = grouped(query, keys.shape[1])
    logits = (rows.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, rows.shape[2:4]) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid is not None:
        logits = logits.masked_fill(~valid, float("-inf"))
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
