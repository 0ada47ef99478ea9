"""Causal softmax attention within a sliding window, in time and memory linear in the length."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.ops.flash_window import by_flash, serves

__all__ = ["by_blocks", "windowed_attention"]

LEAST_BLOCK = 64  # queries that are worked on together at least: shorter blocks would be all overhead


def windowed_attention(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch kv held dim"],
    value: Float[Tensor, "batch kv held width"],
    *,
    window: int,
    scaling: float,
    valid: Bool[Tensor, "batch held"] | None = None,
    sequence: Int[Tensor, "batch held"] | None = None,
    sink: Float[Tensor, " heads"] | None = None,
    always: tuple[
        Float[Tensor, "batch heads length other"], Float[Tensor, "kv more other"], Float[Tensor, "kv more width"]
    ]
    | None = None,
) -> Float[Tensor, "batch heads length width"]:
    """Each query attends to the last ``window`` keys, its own included.

    The queries stand at the last ``length`` of the ``held`` keys.

    Args:
        valid: keys that exist; a query always sees its own.
        sequence: number of the packed sequence of each key; none attends into another.
        sink: per head the score of a further key, which all queries see and whose value is zero.
        always: keys and values that all queries see besides, and before them the queries that these are asked with.
    """
    if valid is None and sequence is None and serves(query, value):
        return by_flash(query, key, value, window=window, scaling=scaling, sink=sink, always=always)
    return by_blocks(
        query, key, value, window=window, scaling=scaling, valid=valid, sequence=sequence, sink=sink, always=always
    )


def by_blocks(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch kv held dim"],
    value: Float[Tensor, "batch kv held width"],
    *,
    window: int,
    scaling: float,
    valid: Bool[Tensor, "batch held"] | None = None,
    sequence: Int[Tensor, "batch held"] | None = None,
    sink: Float[Tensor, " heads"] | None = None,
    always: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "batch heads length width"]:
    """The same on any device: queries are cut into blocks, each of which sees the keys of its own and of the window
    before it; torch's ``scaled_dot_product_attention`` does the rest."""
    length, held = query.shape[2], key.shape[2]
    if always is not None:  # further channels, which only these keys have, carry what they are asked with
        dim, other = query.shape[-1], always[0].shape[-1]
        query, key = torch.cat([query, always[0]], -1), F.pad(key, (0, other))
        always = always[0], F.pad(always[1], (dim, 0)), always[2]
    block = max(window, LEAST_BLOCK)
    past = held - length
    if length <= block:
        block, blocks, before = length, 1, past
    else:
        blocks, before = -(-length // block), window - 1
    ends = (before - past, blocks * block - length)  # places to fill up before the first key and after the last
    span = before + block
    q = F.pad(query, (0, 0, 0, ends[1])).unflatten(2, (blocks, block))
    k, v = (F.pad(t, (0, 0, *ends)).unfold(2, span, block).mT for t in (key, value))
    place = torch.arange(span, device=query.device)
    behind = place[None, :] - before - torch.arange(block, device=query.device)[:, None]
    seen = ((behind <= 0) & (behind > -window))[None, None]
    if valid is not None or ends != (0, 0):
        exists = torch.ones(1, held, dtype=torch.bool, device=query.device) if valid is None else valid
        seen = seen & F.pad(exists, ends).unfold(1, span, block)[:, :, None, :]
    if sequence is not None:
        number = F.pad(sequence, ends, value=-1).unfold(1, span, block)
        seen = seen & (number[:, :, None, :] == number[:, :, before:, None])
    seen = seen | (behind == 0)
    if always is not None:
        more_k, more_v = (t[None, :, None].expand(k.shape[0], -1, blocks, -1, -1) for t in always[1:])
        k, v = torch.cat([more_k, k], 3), torch.cat([more_v, v], 3)
        seen = F.pad(seen, (more_k.shape[3], 0), value=True)
    if sink is not None:  # one more channel, which only the sink's key has, carries its score
        score = sink.to(q)[None, :, None, None, None].expand(*q.shape[:-1], 1)
        q, k, v = torch.cat([q, score], -1), F.pad(k, (0, 1, 0, 1)), F.pad(v, (0, 0, 0, 1))
        k = k + F.pad(k.new_full((1, 1), 1 / scaling), (k.shape[-1] - 1, 0, k.shape[-2] - 1, 0))
        seen = F.pad(seen, (0, 1), value=True)
    out = _attend(q, k, v, seen, scaling)
    return out.flatten(2, 3)[:, :, :length]


def _attend(
    q: Float[Tensor, "batch heads blocks block dim"],
    k: Float[Tensor, "batch kv blocks span dim"],
    v: Float[Tensor, "batch kv blocks span width"],
    seen: Bool[Tensor, "#batch #blocks block span"],
    scaling: float,
) -> Float[Tensor, "batch heads blocks block width"]:
    """Attention of every block. The query heads of a group stand behind one another, so keys are not repeated."""
    batch, heads, blocks, block, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = q.unflatten(1, (kv_heads, group)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    mask = seen.repeat(1, 1, group, 1).expand(batch, blocks, -1, -1).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scaling)
    return out.unflatten(2, (group, block)).unflatten(0, (batch, blocks)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
