"""HGRN2: gated linear recurrence with an expanded state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from vestige.core.method import Paper, Verdict
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, LinearMixer, Memory
from vestige.layers.ops.recurrence import Drive, exact
from vestige.layers.parts import join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["HGRN2", "HGRN2Layer"]


class HGRN2Layer(LinearLayer):
    """The layer of :class:`HGRN2`. It holds ``S``, ``(batch, heads, dim, dim)``."""

    def __init__(self, mixer: HGRN2, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads = mixer.heads or place.heads
        size = place.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.f_proj = nn.Linear(size, size, bias=False)
        self.i_proj = nn.Linear(size, size, bias=False)
        self.bound = nn.Parameter(torch.empty(size)) if place.index else None
        self.norm = nn.RMSNorm(size, eps=place.eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def draw(self) -> None:
        if self.bound is not None:
            depth = self.place.index / self.place.layers
            init.constant_(self.bound, math.log(depth / (1 - depth)))

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        forget = self.f_proj(x)
        forget = forget.to(exact(forget))
        log_f, k = F.logsigmoid(forget), torch.sigmoid(-forget)
        if self.bound is not None:  # f = bound + (1 - bound) sigmoid, k = 1 - f, without ever taking a difference to 1
            bound = self.bound.to(forget.dtype)
            log_f = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_f)
            k = torch.sigmoid(-bound) * k
        q, v = F.silu(self.q_proj(x)), self.i_proj(x)
        q, k, v, log_f = (split_heads(t, self.heads) for t in (q, k, v, log_f))
        return Drive(q, k, v, log_f, scale=q.shape[-1] ** -0.5, bounded=True)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.norm(join_heads(read)))


class HGRN2(LinearMixer):
    """What a channel forgets makes room for what is written: the key is one minus the forget gate.

    Deeper layers forget less: a lower bound of the gate rises from 0 in the first layer. It begins at
    ``index / layers`` and is learned per channel and layer; in the paper one softmax over all layers ties the bounds
    together, so that they cannot cross.
    """

    name = "hgrn2"
    paper = Paper(
        title="HGRN2: Gated Linear RNNs with State Expansion",
        year=2024,
        arxiv="2404.07904",
        venue="COLM 2024",
        code="https://github.com/OpenNLPLab/HGRN2",
        equations="section 3.2, equations 6 and 7",
    )
    verdict = Verdict(
        "reproduced",
        "Of keys written twice the new value is recalled at 0.92 to 0.95; by linear attention at 0.54 to 0.56"
        " (3 seeds). Language modelling at scale was not looked at.",
    )
    forgets = "each key channel fades at a rate that the token chooses, the slower the deeper the layer"
    layer = HGRN2Layer
