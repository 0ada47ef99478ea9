r"""Titans, memory as context. In segments, with :math:`M_b` the memory at the segment's beginning,

.. math:: h_t = M_b(W_r x_t), \qquad y_t = \operatorname{Attn}(x_t;\, [p,\, h_{\le t},\, x_{\le t}]), \qquad
    o_t = W_o\,(n(y_t) \odot \operatorname{SiLU}(n(M_t(W_q y_t)))),

where :math:`M_t` has learned :math:`y` up to :math:`t`, and attention sees the segment alone.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.memorising import memories
from vestige.evidence.references.mixing import Weights, by_head, linear, rotate, silu
from vestige.evidence.references.titans_mag import combined

__all__ = ["SMALL", "mix"]

SMALL = {"refresh": 4, "expand": 2, "persistent": 2}


def unit(z: Tensor) -> Tensor:
    """Of length one."""
    return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def attended(
    part: Float[Tensor, "T hidden"], recalled: Float[Tensor, "T hidden"], weights: Weights, heads: int, theta: float
) -> Float[Tensor, "T hidden"]:
    """Attention within a segment, to what was recalled, to the tokens, and to those that stand nowhere."""
    names = [f"attention.{letter}_proj" for letter in "qkv"]
    q, k, v = (by_head(linear(part, weights, name), heads) for name in names)
    hk, hv = (by_head(linear(recalled, weights, name), heads) for name in names[1:])
    pk, pv = (by_head(linear(weights["attention.persistent"], weights, name), heads) for name in names[1:])
    turned_q, turned_k, turned_h = rotate(q, theta), rotate(k, theta), rotate(hk, theta)
    rows = []
    for t in range(len(part)):
        outputs = []
        for h in range(heads):
            past = torch.cat([turned_h[: t + 1, h], turned_k[: t + 1, h]])
            score = torch.cat([pk[:, h] @ q[t, h], past @ turned_q[t, h]])
            weight = torch.exp(score / q.shape[-1] ** 0.5)
            outputs.append(weight @ torch.cat([pv[:, h], hv[: t + 1, h], v[: t + 1, h]]) / weight.sum())
        rows.append(torch.cat(outputs))
    return linear(torch.stack(rows), weights, "y_proj")


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    refresh: int,
    expand: int,
    momentum: bool,
    persistent: int,
    theta: float,
    **settings: Any,
) -> Float[Tensor, "T hidden"]:
    """Segment after segment, each time with the memory of all that attention has given so far."""
    heads = heads or place.heads
    gates = ("alpha", "theta", "eta") if momentum else ("alpha", "theta")

    def read(y: Tensor, asked: Tensor) -> Tensor:
        """Ask a memory that learns all of y; the queries beyond it are answered with what is held at its end."""
        learnt = torch.cat([y, y.new_zeros(len(asked) - len(y), asked.shape[1] * asked.shape[2])])
        k, v = (silu(by_head(linear(learnt, weights, name), heads)) for name in ("k_proj", "v_proj"))
        k = unit(k)
        return memories(
            learnt, asked, k, v, weights, gates=gates, refresh=refresh, still=range(len(y), len(asked)), **settings
        )

    y = x[:0]
    for first in range(0, len(x), refresh):
        part = x[first : first + refresh]
        asked = unit(by_head(linear(part, weights, "r_proj"), heads))
        recalled = read(y, torch.cat([asked.new_zeros(first, *asked.shape[1:]), asked]))[first:]
        y = torch.cat([y, attended(part, recalled.flatten(1), weights, heads, theta)])
    asked = unit(silu(by_head(linear(y, weights, "q_proj"), heads)))
    return combined(y, read(y, asked), weights, place.eps)
