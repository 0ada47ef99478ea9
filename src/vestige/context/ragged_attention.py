"""Attention of one token per row over a ragged layer, and what may stand for entries that were dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vestige.context.layer import KeptLayer, Step
from vestige.context.ragged import RaggedLayer
from vestige.layers.ops.attention_mass import capped

if TYPE_CHECKING:
    from vestige.context.attention import Look
    from vestige.context.policy import CachePolicy

__all__ = ["StandIn", "attend_ragged"]


@dataclass(frozen=True)
class StandIn:
    """One entry per head that stands for others, dropped: ``weight`` is added to its logit.

    Attributes:
        key, value: ``(batch, kv_heads, dim)``.
        weight: ``(batch, kv_heads)``; minus infinity where nothing has been dropped.
    """

    key: Tensor
    value: Tensor
    weight: Tensor

    @classmethod
    def of(cls, policy: CachePolicy, layer: KeptLayer, look: Look) -> StandIn | None:
        """What stands in a layer for entries dropped; nothing where a sliding window would hide those anyway."""
        return None if policy.ranking is None or look.slides else policy.ranking.stand_in(layer)

    def before(self, keys: Tensor, values: Tensor, mask: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and a mask to add to logits, ``(batch, heads, queries, 1 + slots)``, with this entry first."""
        seen = torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device).masked_fill_(~mask, float("-inf"))
        weight = self.weight.repeat_interleave(group, dim=1)[..., None, None].to(keys.dtype)
        seen = seen.expand(*weight.shape[:2], -1, -1)
        mask = torch.cat([weight.expand(-1, -1, seen.shape[2], -1), seen], dim=3)
        first_key, first_value = self.key[:, :, None].to(keys.dtype), self.value[:, :, None].to(values.dtype)
        return torch.cat([first_key, keys], dim=2), torch.cat([first_value, values], dim=2), mask


def attend_ragged(
    module: torch.nn.Module, look: Look, layer: RaggedLayer, policy: CachePolicy, step: Step
) -> Float[Tensor, "rows 1 heads dim"]:
    """One token per row over a ragged layer: heads with segments of one size together, without copying them.

    On CUDA one kernel reads all segments as they lie, unless the policy wants to see the weights or the model's
    attention is of a kind that it does not know.
    """
    rows, heads, _, dim = look.query.shape
    plain = look.softcap is None and look.window is None and not policy.needs_attention
    if look.query.is_cuda and plain and look.query.dtype != torch.float64 and StandIn.of(policy, layer, look) is None:
        layer.let_go()
        return _attend_flat(look, layer)
    group = heads // layer.kv_heads
    query = look.query.reshape(rows * layer.kv_heads, group, dim)[layer.order]
    oldest = None if look.window is None else (step.rows(layer.device) - look.window)
    stand_in = StandIn.of(policy, layer, look)
    if stand_in is not None:
        parts = (stand_in.key, stand_in.value, stand_in.weight)
        stand_in = StandIn(*(part.flatten(0, 1)[layer.order] for part in parts))
    outputs, received = [], None
    if policy.needs_attention:
        exact = torch.promote_types(query.dtype, torch.float32)
        received = query.new_zeros(len(query), group, layer.slots, dtype=exact)
    for run in layer.segments.runs:
        used = [layer.used[head] for head in run.heads]
        reach = max(used)
        mask = None
        if min(used) < reach:
            mask = torch.arange(reach, device=layer.device) < layer.lengths[layer.order[run.among], None]
        if oldest is not None:
            bound = oldest
            if isinstance(oldest, Tensor):
                bound = oldest.flatten()[layer.order[run.among] // layer.kv_heads][:, None]
            near = run.of(layer.positions)[:, :reach] >= bound
            mask = near if mask is None else mask & near
        other = None
        if stand_in is not None:
            other = StandIn(stand_in.key[run.among], stand_in.value[run.among], stand_in.weight[run.among])
        keys, values = run.of(layer.keys)[:, :reach], run.of(layer.values)[:, :reach]
        output, share = _attend_group(query[run.among], keys, values, mask, look, policy.needs_attention, other)
        outputs.append(output)
        if received is not None:
            received[run.among, :, :reach] = share
    if received is not None:
        entries = layer.entries
        policy.receive(entries, received[layer.inverse].unflatten(0, (rows, layer.kv_heads)), step)
        entries.commit()
    layer.let_go()
    return torch.cat(outputs)[layer.inverse].reshape(rows, 1, heads, -1)


def _attend_flat(look: Look, layer: RaggedLayer) -> Float[Tensor, "rows 1 heads dim"]:
    from vestige.layers.ops.decode_triton import APPEND, SlotTable, attend_slots

    table = SlotTable(
        keys=layer.keys,
        values=layer.values,
        positions=layer.positions,
        mass=None,
        offset=layer.offsets,
        length=layer.lengths,
        target=layer.lengths,
        rows=layer.rows,
        kv_heads=layer.kv_heads,
        capacity=max(layer.segments.sizes),
    )
    return attend_slots(table, look.query, layer.lengths, scaling=look.scaling, mode=APPEND)


def _attend_group(
    query: Float[Tensor, "count group dim"],
    keys: Float[Tensor, "count slots dim"],
    values: Float[Tensor, "count slots dim"],
    mask: Bool[Tensor, "count slots"] | None,
    look: Look,
    weights: bool,
    stand_in: StandIn | None,
) -> tuple[Float[Tensor, "count group dim"], Float[Tensor, "count group slots"] | None]:
    """Attention of each head's queries over its entries, and its weights where they are asked for."""
    if not weights and look.softcap is None and stand_in is None:
        shown = None if mask is None else mask[:, None, None]
        output = scaled_dot_product_attention(
            query[:, None], keys[:, None], values[:, None], attn_mask=shown, scale=look.scaling
        )
        return output.squeeze(1), None
    exact = torch.promote_types(query.dtype, torch.float32)
    logits = capped(((query @ keys.transpose(1, 2)) * look.scaling).to(exact), look.softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    if stand_in is None:
        share = torch.softmax(logits, dim=-1)
        return share.to(values.dtype) @ values, share if weights else None
    other = (query.to(exact) @ stand_in.key[..., None].to(exact)) * look.scaling + stand_in.weight[:, None, None]
    share = torch.softmax(torch.cat([logits, other], dim=2), dim=-1)
    share, other = share[..., :-1], share[..., -1:]
    output = (share.to(values.dtype) @ values) + (other * stand_in.value[:, None]).to(values.dtype)
    return output, share if weights else None
