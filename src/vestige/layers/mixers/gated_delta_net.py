"""Gated DeltaNet: correct what a key holds, and let all of it fade."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.delta_net import DeltaRuleLayer, DeltaRuleMixer
from vestige.layers.mixers.recurrent import Memory
from vestige.layers.ops.recurrence import Drive, exact
from vestige.layers.parts import GatedHeadNorm, draw_decay_rate, draw_time_step, join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["GatedDeltaNet", "GatedDeltaNetLayer"]


class GatedDeltaNetLayer(DeltaRuleLayer):
    """The layer of :class:`GatedDeltaNet`."""

    def __init__(self, mixer: GatedDeltaNet, place: Place) -> None:
        super().__init__(mixer, place)
        self.a_proj = nn.Linear(place.hidden_size, self.heads, bias=False)
        self.a_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.g_proj = nn.Linear(place.hidden_size, self.widths[2], bias=False)
        self.norm = GatedHeadNorm(self.values, place.eps)

    def draw(self) -> None:
        draw_decay_rate(self.a_log)
        draw_time_step(self.dt_bias)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        a = self.a_proj(x)
        a = a.to(exact(a))
        decay = -self.a_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))
        return replace(super().project(x, layout, memory), decay=decay)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(self.norm(read, split_heads(self.g_proj(x), self.heads))))


class GatedDeltaNet(DeltaRuleMixer):
    """The delta rule with a gate per head and token that lets the whole memory fade: replace one thing, or clear it."""

    name = "gated-delta-net"
    paper = Paper(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        year=2024,
        arxiv="2412.06464",
        venue="ICLR 2025",
        code="https://github.com/NVlabs/GatedDeltaNet",
        equations="equation 10; section 3.3 (the chunked form); section 3.4",
    )
    verdict = Verdict(
        "reproduced",
        "Of keys written twice the new value is recalled at 0.92 to 1.00; by Mamba-2 at 0.50 to 0.82 with a "
        "state no smaller (3 seeds). Language modelling at scale was not looked at.",
    )
    forgets = "each head fades by a gate of the token, and writing to a key takes away what it held"
    layer = GatedDeltaNetLayer

    expand_k: float = param(0.75, "width of all keys over the hidden size", gt=0)
    expand_v: float = param(1.5, "width of all values over the hidden size", gt=0)
