r"""Weighted column sums of softmax attention, without ever holding the attention matrix.

Many cache policies rank an entry by the attention that it has received,

.. math:: m_j = \sum_i w_i \sum_{h \in \text{group}} \operatorname{softmax}_j(q_{h,i} \cdot k_j / \tau),

and differ only in the weight :math:`w_i` of query *i*: one for all (accumulated), a power of a
forgetting factor (decayed), one for the last *W* queries (windowed). So one operation serves all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["attention_mass", "capped", "grouped", "visible", "within"]

BLOCK_BYTES = 8 * 2**20  # one block of float32 probabilities: small enough for a processor cache


def grouped(
    query: Float[Tensor, "batch heads length dim"], kv_heads: int
) -> Float[Tensor, "batch kv group length dim"]:
    """View the query heads by the key-value head that they share."""
    batch, heads, length, dim = query.shape
    return query.view(batch, kv_heads, heads // kv_heads, length, dim)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits that stay within ``softcap``, as Gemma 2 has them; as they are without one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def visible(first: int, last: int, length: int, entries: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Which keys the queries ``first..last`` of a chunk may see: the chunk's ``length`` queries are the last keys."""
    held = entries - length
    queries = torch.arange(held + first, held + last, device=device)[:, None]
    return torch.arange(held + last, device=device)[None, :] <= queries


def within(
    positions: Int[Tensor, "batch kv entries"], first: int, last: int, length: int, window: int
) -> Bool[Tensor, "batch kv queries keys"]:
    """Which keys lie within the window of the queries ``first..last``, by position: among the last ``window`` tokens.

    Entries may be missing between them, so slots do not tell.
    """
    held = positions.shape[-1] - length
    queries = positions[..., held + first : held + last, None]
    return positions[..., None, : held + last] > queries - window


def attention_mass(
    query: Float[Tensor, "batch heads length dim"],
    keys: Float[Tensor, "batch kv entries dim"],
    weights: Float[Tensor, "... length"],
    *,
    scaling: float,
    valid: Bool[Tensor, "batch kv entries"] | None = None,
    softcap: float | None = None,
    window: int | None = None,
    positions: Int[Tensor, "batch kv entries"] | None = None,
) -> Float[Tensor, "batch kv entries"]:
    """Attention that each key receives from the queries of its group, each query weighted.

    Args:
        query: the chunk's queries; they stand at the last ``length`` of the ``entries`` keys and see
            causally: all keys before the chunk, and those of the chunk up to themselves.
        keys: held keys followed by the chunk's.
        weights: per query, ``(length,)`` or ``(batch, length)``. Leading queries of weight zero cost nothing
            if the caller slices them off; a row of padding has weight zero.
        scaling: factor of the logits.
        valid: entries that exist; the others get no attention.
        softcap: ``softcap * tanh(logits / softcap)``, as Gemma 2 applies it.
        window: sliding window in tokens, counted with the query itself.
        positions: of the keys in the text, which a window is counted in; needed with ``window``.

    Returns:
        float32 (float64 for float64 input) sums over the queries and over the query heads of each group.

    Memory: one block of queries against all keys, 8 MiB; time as one attention product.
    """
    if query.is_cuda and softcap is None and window is None and query.dtype != torch.float64:
        from vestige.layers.ops.attention_mass_triton import attention_mass_cuda

        return attention_mass_cuda(query, keys, weights, scaling=scaling, valid=valid)
    batch, heads, length, _ = query.shape
    kv_heads, entries = keys.shape[1], keys.shape[2]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = heads // kv_heads
    block = max(16, min(length, BLOCK_BYTES // (4 * batch * heads * entries)))
    keys_t = keys.to(exact).transpose(-1, -2)
    weights = weights.to(exact).expand(batch, length)
    mass = torch.zeros(batch, kv_heads, entries, dtype=exact, device=query.device)
    for first in range(0, length, block):
        last = min(first + block, length)
        shown = entries - length + last
        rows = grouped(query[:, :, first:last], kv_heads).to(exact).flatten(2, 3) * scaling
        logits = capped(rows @ keys_t[..., :shown], softcap)
        by_head = logits.view(batch, kv_heads, group, last - first, shown)
        if window is not None:
            assert positions is not None
            by_head.masked_fill_(~within(positions, first, last, length, window)[:, :, None], float("-inf"))
        if last - first > 1:  # only the block's own keys can lie ahead of a query
            own = torch.ones(last - first, last - first, dtype=torch.bool, device=query.device)
            by_head[..., shown - (last - first) :].masked_fill_(own.triu_(1), float("-inf"))
        if valid is not None:
            logits.masked_fill_(~valid[:, :, None, :shown], float("-inf"))
        share = torch.softmax(logits, dim=-1)
        if valid is not None:
            share.nan_to_num_()  # a row of padding may see nothing at all
        mass[..., :shown] += (weights[:, None, None, first:last].repeat(1, 1, 1, group) @ share).squeeze(2)
    return mass
