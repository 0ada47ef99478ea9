"""Lightning attention: linear attention with a fixed decay per head, in blocks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, LinearMixer, Memory
from vestige.layers.ops.recurrence import Drive
from vestige.layers.parts import join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["FixedDecayMixer", "LightningAttention", "LightningAttentionLayer", "fixed_decay"]

Slopes = Literal["paper", "alibi"]


def fixed_decay(heads: int, place: Place, slopes: Slopes, like: Tensor) -> Tensor:
    """``(heads,)`` logarithms of the decay: later heads, and lower layers, forget faster.

    ``paper``: ``-(8 h / heads) (1 - index / layers)``, heads h counted from 1 and layers from 0, so that even the last
    layer's states stay bounded. ``alibi``: the authors' code, ``-2^(-8 h / heads) (1 - index / (layers - 1) + 1e-5)``.
    """
    head = torch.arange(1, heads + 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    if slopes == "paper":
        return -(8 * head / heads) * (1 - place.index / place.layers)
    return -_alibi(heads, head) * (1 - place.index / max(1, place.layers - 1) + 1e-5)


def _alibi(heads: int, head: Tensor) -> Tensor:
    """ALiBi's slopes: for a power of two a geometric series; else that of the next lower one, and between its terms."""
    lower = 1 << int(math.log2(heads))
    whole = 2.0 ** (-8 * head / lower)
    between = 2.0 ** (-4 * (2 * (head - lower) - 1) / lower)
    return torch.where(head <= lower, whole, between)


class FixedDecayMixer(LinearMixer):
    """Base of the mixers whose decay is fixed per head and layer."""

    slopes: Slopes = param("paper", "rule of the decays: the paper's, or ALiBi's slopes as in the authors' code")


class LightningAttentionLayer(LinearLayer):
    """The layer of :class:`LightningAttention`. It holds ``S``, ``(batch, heads, dim, dim)``."""

    mixer: LightningAttention

    def __init__(self, mixer: LightningAttention, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads = mixer.heads or place.heads
        size = place.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.gate = nn.Sequential(nn.Linear(size, mixer.rank, bias=False), nn.Linear(mixer.rank, size, bias=False))
        self.norm = nn.RMSNorm(size, eps=place.eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        q, k, v = (split_heads(F.silu(f(x)), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return Drive(q, k, v, fixed_decay(self.heads, self.place, self.mixer.slopes, x), bounded=True)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.norm(join_heads(read)) * torch.sigmoid(self.gate(x)))


class LightningAttention(FixedDecayMixer):
    """Linear attention with a fixed exponential decay, split into a product within blocks and a state between them, so
    that a token costs the same at every length."""

    name = "lightning-attention"
    paper = Paper(
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        year=2024,
        arxiv="2405.17381",
        venue="ICML 2024",
        code="https://github.com/OpenNLPLab/lightning-attention",
        equations="sections 3.2 (algorithms 1 and 2) and 4.1",
    )
    verdict = Verdict(
        "reproduced",
        "Operations per token are the same at 256 and 2048 tokens (softmax attention's grow 6.6 times); of "
        "keys written twice the new value is recalled at 0.91 to 0.95, by linear attention at 0.54 to 0.56 (3"
        " seeds).",
    )
    forgets = "each head fades at a fixed rate"
    layer = LightningAttentionLayer

    rank: int = param(16, "rank of the output gate", ge=1)
