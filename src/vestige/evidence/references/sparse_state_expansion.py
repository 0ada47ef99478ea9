r"""Sparse state expansion, partition by partition, with :math:`e = \operatorname{softmax}(W_e x)` and :math:`T` its
largest entries:

.. math:: S^0_t = \operatorname{diag}(\alpha_t) S^0_{t-1} + k_t v_t^\top, \qquad
    S^i_t = \operatorname{diag}(\alpha'_t) S^i_{t-1} + e_i k'_t v_t^\top \text{ for } i \in T, \text{ else } S^i_{t-1},

.. math:: o_t = \frac{1}{\sqrt{d_k}} \Big( {S^0_t}^\top q_t + \sum_{i \in T} e_i\, {S^i_t}^\top q'_t \Big) ,

where keys are the softmax of their largest entries, and rows whose key is zero do not fade either.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, silu

__all__ = ["SMALL", "mix"]

SMALL = {"partitions": 3, "rows": 3, "rank": 3, "balance": 0.0}


def sparse_key(k: Float[Tensor, " keys"], rows: int | None) -> tuple[Tensor, Tensor]:
    """The softmax over the largest entries, zero elsewhere; and where those stand."""
    count = len(k) if rows is None else rows
    kept = sorted(range(len(k)), key=lambda j: float(k[j].detach()), reverse=True)[:count]
    where = torch.zeros_like(k)
    where[kept] = 1.0
    weight = torch.exp(k - k.max()) * where
    return weight / weight.sum(), where


def mix(
    x: Float[Tensor, "T hidden"],
    weights: Weights,
    place: Any,
    *,
    heads: int | None,
    partitions: int,
    active: int,
    rows: int | None,
    **unused: Any,
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head, partition by partition. Widths show in the weights."""
    heads = heads or place.heads

    def low_rank(name: str) -> Tensor:
        return linear(linear(x, weights, f"{name}.0"), weights, f"{name}.1")

    q, k, v = (linear(x, weights, name) for name in ("q_proj", "k_proj", "v_proj"))
    q2, k2 = q + low_rank("q_change"), k + low_rank("k_change")
    names = ("decay", "partition_decay")
    alpha, alpha2 = (by_head(torch.sigmoid(low_rank(name)) ** (1 / 16), heads) for name in names)
    q, q2, v = (by_head(silu(t), heads) for t in (q, q2, v))
    k, k2, g = by_head(k, heads), by_head(k2, heads), by_head(low_rank("g_proj"), heads)
    e = torch.softmax(linear(x, weights, "router"), -1)
    S = [[torch.zeros(k.shape[-1], v.shape[-1], dtype=x.dtype)] * (partitions + 1) for _ in range(heads)]
    results = []
    for t in range(len(x)):
        touched = sorted(range(partitions), key=lambda i: float(e[t, i].detach()), reverse=True)[:active]
        outputs = []
        for h in range(heads):
            key, where = sparse_key(k[t, h], rows)
            fade = torch.where(where > 0, alpha[t, h], 1.0)
            S[h][0] = torch.diag(fade) @ S[h][0] + torch.outer(key, v[t, h])
            o = S[h][0].T @ q[t, h]
            key, where = sparse_key(k2[t, h], rows)
            fade = torch.where(where > 0, alpha2[t, h], 1.0)
            for i in touched:
                S[h][i + 1] = torch.diag(fade) @ S[h][i + 1] + e[t, i] * torch.outer(key, v[t, h])
                o = o + e[t, i] * (S[h][i + 1].T @ q2[t, h])
            o = o / k.shape[-1] ** 0.5
            outputs.append(rms_norm(o, weights["norm.norm.weight"], place.eps) * silu(g[t, h]))
        results.append(torch.cat(outputs))
    return linear(torch.stack(results), weights, "o_proj")
