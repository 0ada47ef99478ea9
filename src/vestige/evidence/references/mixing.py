r"""What the references of mixers share: small functions of one sequence, written to be read beside a paper.

A reference offers ``mix(x, weights, place, **hyper-parameters) -> y``: ``x`` and ``y`` are ``(T, hidden_size)``, in
float64; ``weights`` are the layer's parameters under its own names; ``place`` says where the layer stands in its model
(:class:`vestige.layers.place.Place`). It goes token by token, with every sum written out, and nothing of the layer's
own code takes part. ``SMALL``, if there, holds hyper-parameters that make a layer of a few channels possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Weights",
    "by_head",
    "linear",
    "rms_norm",
    "rotate",
    "short_convolution",
    "silu",
    "softmax_attention",
    "softplus",
]

Weights = Mapping[str, Tensor]


def linear(x: Float[Tensor, "... inputs"], weights: Weights, name: str) -> Float[Tensor, "... outputs"]:
    """``W x + b``."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def by_head(x: Float[Tensor, "T width"], heads: int) -> Float[Tensor, "T heads dim"]:
    """The width as heads side by side."""
    return x.reshape(len(x), heads, -1)


def silu(x: Tensor) -> Tensor:
    """``x sigma(x)``."""
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``."""
    return torch.logaddexp(x, torch.zeros_like(x))


def rms_norm(x: Float[Tensor, "... dim"], weight: Tensor | float, eps: float) -> Float[Tensor, "... dim"]:
    """``x / sqrt(mean(x^2) + eps)``, times a weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def short_convolution(
    x: Float[Tensor, "T channels"], weight: Float[Tensor, "channels size"], bias: Tensor | None = None
) -> Float[Tensor, "T channels"]:
    """SiLU of a weighted sum of the last tokens, the last weight for the newest; before the first token all is zero."""
    size = weight.shape[1]
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[0]) if bias is None else bias
        for back in range(min(size, t + 1)):
            row = row + weight[:, size - 1 - back] * x[t - back]
        rows.append(silu(row))
    return torch.stack(rows)


def rotate(x: Float[Tensor, "T heads dim"], theta: float) -> Float[Tensor, "T heads dim"]:
    """Rotary positions: each pair ``(x_j, x_{j + dim/2})``, as a complex number, times ``e^{i t theta^{-2j/dim}}``."""
    half = x.shape[-1] // 2
    speed = torch.tensor([theta ** (-j / half) for j in range(half)], dtype=x.dtype)
    angle = torch.arange(len(x), dtype=x.dtype)[:, None, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def softmax_attention(
    q: Float[Tensor, "T heads dim"],
    k: Float[Tensor, "T kv dim"],
    v: Float[Tensor, "T kv dim"],
    window: int | None = None,
) -> Float[Tensor, "T heads dim"]:
    """Each query sees its own and earlier tokens, or the last ``window`` of them; heads share keys in groups."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        outputs = []
        for head in range(q.shape[1]):
            past_k, past_v = k[first : t + 1, head // group], v[first : t + 1, head // group]
            weight = torch.exp(past_k @ q[t, head] / math.sqrt(q.shape[-1]))
            outputs.append(weight @ past_v / weight.sum())
        rows.append(torch.stack(outputs))
    return torch.stack(rows)
