"""Softmax attention: ``softmax(q k^T / sqrt(d)) v`` over the past, rotary positions, grouped key-value heads."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, rotate, softmax_attention

__all__ = ["mix", "projected"]


def projected(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    kv_heads: int | None,
    positions: str,
    theta: float,
    qk_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head."""
    heads = heads or place.heads
    kv_heads = kv_heads or place.kv_heads or heads
    q = by_head(linear(x, weights, "q_proj"), heads)
    k = by_head(linear(x, weights, "k_proj"), kv_heads)
    v = by_head(linear(x, weights, "v_proj"), kv_heads)
    if qk_norm:
        q = rms_norm(q, weights["q_norm.weight"], place.eps)
        k = rms_norm(k, weights["k_norm.weight"], place.eps)
    if positions == "rotary":
        q, k = rotate(q, theta), rotate(k, theta)
    return q, k, v


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    window: int | None = None,
    head_dim: int | None = None,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Project, attend, project back. ``head_dim`` shows in the weights."""
    q, k, v = projected(x, weights, place, **settings)
    return linear(softmax_attention(q, k, v, window).flatten(1), weights, "o_proj")
