"""Mamba-2: a selective state-space model, as linear attention with one decay per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, Memory, RecurrentMixer
from vestige.layers.ops.recurrence import Drive, exact
from vestige.layers.parts import ShortConvolution, draw_decay_rate, draw_time_step, join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["Mamba2", "Mamba2Layer"]


@dataclass(frozen=True, kw_only=True)
class Scan(Drive):
    """A drive, and the values before the time step scales them, which pass by the state."""

    skip: Tensor


class Mamba2Layer(LinearLayer):
    """The layer of :class:`Mamba2`. It holds ``S``, ``(batch, heads, state, head_dim)``, and the convolution's
    inputs, ``conv``."""

    mixer: Mamba2

    def __init__(self, mixer: Mamba2, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, inner = mixer.sizes(place)
        shared = mixer.groups * mixer.state
        self.widths = [inner, shared, shared]
        size = place.hidden_size
        self.in_proj = nn.Linear(size, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(size, self.heads, bias=False)
        self.g_proj = nn.Linear(size, inner, bias=False)
        self.conv = ShortConvolution(sum(self.widths), mixer.conv, bias=True)
        self.a_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.skip = nn.Parameter(torch.empty(self.heads))
        self.norm = nn.Parameter(torch.empty(inner))
        self.o_proj = nn.Linear(inner, size, bias=False)

    def draw(self) -> None:
        draw_decay_rate(self.a_log, low=1.0)
        draw_time_step(self.dt_bias)
        init.ones_(self.skip)
        init.ones_(self.norm)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Scan:
        parts, memory["conv"] = self.conv(self.in_proj(x), layout, memory.get("conv"))
        value, b, c = parts.split(self.widths, -1)
        b, c = (split_heads(t, self.mixer.groups) for t in (b, c))
        value = split_heads(value, self.heads)
        dt = self.dt_proj(x)
        dt = F.softplus(dt.to(exact(dt)) + self.dt_bias.to(exact(dt)))
        scaled = (dt[..., None] * value).to(value.dtype)
        return Scan(c, b, scaled, -self.a_log.to(dt.dtype).exp() * dt, skip=value)

    def chunked(self, inputs: Any, layout: Layout, memory: Memory) -> Tensor:
        return super().chunked(inputs, layout, memory) + self.skip[:, None] * inputs.skip

    step = chunked

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        gated = split_heads(join_heads(read) * F.silu(self.g_proj(x)), self.mixer.groups)
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.place.eps)
        return self.o_proj(join_heads(normed) * self.norm)


class Mamba2(RecurrentMixer):
    """A state-space model whose transition is one decay per head: each token chooses how long a step it takes, and
    with it both how much fades and how much is written.

    Keys and queries (B and C) are shared by the heads of a group.
    """

    name = "mamba2"
    paper = Paper(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality",
        year=2024,
        arxiv="2405.21060",
        venue="ICML 2024",
        code="https://github.com/state-spaces/mamba",
        equations="section 2, equation 2; section 6 (the chunked form); section 7.1",
    )
    verdict = Verdict(
        "reproduced",
        "Of keys written twice the new value is recalled at 0.89 to 0.98; by linear attention at 0.52 to 0.59"
        " (3 seeds). Speed against the first Mamba was not looked at.",
    )
    forgets = "each head fades by the time step that the token chooses"
    layer = Mamba2Layer

    expand: float = param(2.0, "width of all heads over the hidden size", gt=0)
    head_dim: int = param(64, "width of a head", ge=1)
    state: int = param(128, "entries per channel of a head", ge=1)
    groups: int = param(1, "groups of heads that share keys and queries", ge=1)
    conv: int = param(4, "tokens that the short convolution spans", ge=1)

    def sizes(self, place: Place) -> tuple[int, int]:
        """Heads, width of all of them."""
        inner = self.expand * place.hidden_size
        if inner != int(inner) or int(inner) % self.head_dim:
            raise SpecError(f"{self.name}: head_dim = {self.head_dim} does not divide expand * hidden_size = {inner:g}")
        heads = int(inner) // self.head_dim
        if heads % self.groups:
            raise SpecError(
                f"{self.name}: groups = {self.groups} does not divide expand * hidden_size / head_dim = {heads} heads"
            )
        return heads, int(inner)

    def check_place(self, place: Place) -> None:
        self.sizes(place)
