r"""Lightning attention, as the sum over the past that its blocks compute:

.. math:: o_t = \sum_{s \le t} \lambda^{t-s} (q_t \cdot k_s)\, v_s, \qquad
    y_t = W_o\,(\operatorname{RMSNorm}(o_t) \odot \sigma(W_u W_d x_t)) ,

queries, keys and values through SiLU, a decay :math:`\lambda` per head and layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, silu

__all__ = ["alibi_slopes", "decays", "fading_sum", "mix"]


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of ALiBi (arXiv 2108.12409): geometric where the number of heads is a power of two; else those of the
    next lower power, filled up with every second one of the next higher."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def decays(heads: int, place: Any, slopes: str) -> list[float]:
    """What one token leaves of the past, per head."""
    if slopes == "paper":
        return [math.exp(-(8 * h / heads) * (1 - place.index / place.layers)) for h in range(1, heads + 1)]
    depth = 1 - place.index / max(1, place.layers - 1) + 1e-5
    return [math.exp(-slope * depth) for slope in alibi_slopes(heads)]


def fading_sum(
    q: Float[Tensor, "T heads keys"],
    k: Float[Tensor, "T heads keys"],
    v: Float[Tensor, "T heads values"],
    decay: list[float],
) -> Float[Tensor, "T width"]:
    """What each token reads, heads side by side."""
    rows = []
    for t in range(len(q)):
        outputs = [
            sum(decay[h] ** (t - s) * torch.dot(q[t, h], k[s, h]) * v[s, h] for s in range(t + 1))
            for h in range(len(decay))
        ]
        rows.append(torch.cat(outputs))  # type: ignore[arg-type]
    return torch.stack(rows)


def mix(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, slopes: str, **unused: Any
) -> Float[Tensor, "T hidden"]:
    """Token by token, head by head."""
    heads = heads or place.heads
    q, k, v = (by_head(silu(linear(x, weights, name)), heads) for name in ("q_proj", "k_proj", "v_proj"))
    read = fading_sum(q, k, v, decays(heads, place, slopes))
    gate = torch.sigmoid(linear(linear(x, weights, "gate.0"), weights, "gate.1"))
    return linear(rms_norm(read, weights["norm.weight"], place.eps) * gate, weights, "o_proj")
