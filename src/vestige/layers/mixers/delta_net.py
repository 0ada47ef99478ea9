"""DeltaNet: write what the memory got wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, LinearMixer, Memory
from vestige.layers.ops.recurrence import Drive
from vestige.layers.parts import ShortConvolution, join_heads, split_heads, unit
from vestige.layers.place import Place

__all__ = ["DeltaNet", "DeltaNetLayer", "DeltaRuleLayer", "DeltaRuleMixer"]


class DeltaRuleMixer(LinearMixer):
    """Base of the mixers that correct what a key holds: sizes, short convolutions, unit keys, a rate."""

    expand_k: float = param(1.0, "width of all keys over the hidden size", gt=0)
    expand_v: float = param(1.0, "width of all values over the hidden size", gt=0)
    conv: int = param(4, "tokens that the short convolution of queries, keys and values spans; 0: none", ge=0)
    negative: bool = param(False, "rates up to 2, so that a key's content can change its sign, instead of up to 1")

    def sizes(self, place: Place) -> tuple[int, int, int]:
        """Heads, keys per head, values per head."""
        heads = self.heads or place.heads
        keys = self.share(self.expand_k * place.hidden_size, heads, "expand_k * hidden_size")
        return heads, keys, self.share(self.expand_v * place.hidden_size, heads, "expand_v * hidden_size")

    def check_place(self, place: Place) -> None:
        self.sizes(place)


class DeltaRuleLayer(LinearLayer):
    """Queries, keys, values and rates. It holds ``S``, ``(batch, heads, keys, values)``, and the convolution's
    inputs, ``conv``."""

    mixer: DeltaRuleMixer

    def __init__(self, mixer: DeltaRuleMixer, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, keys, self.values = mixer.sizes(place)
        self.widths = [self.heads * keys, self.heads * keys, self.heads * self.values]
        self.scale = keys**-0.5
        size = place.hidden_size
        self.q_proj = nn.Linear(size, self.widths[0], bias=False)
        self.k_proj = nn.Linear(size, self.widths[1], bias=False)
        self.v_proj = nn.Linear(size, self.widths[2], bias=False)
        self.b_proj = nn.Linear(size, self.heads, bias=False)
        self.conv = ShortConvolution(sum(self.widths), mixer.conv) if mixer.conv else None
        self.o_proj = nn.Linear(self.widths[2], size, bias=False)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        parts = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        if self.conv is None:
            parts = F.silu(parts)
        else:
            parts, memory["conv"] = self.conv(parts, layout, memory.get("conv"))
        q, k, v = (split_heads(part, self.heads) for part in parts.split(self.widths, -1))
        beta = torch.sigmoid(self.b_proj(x))
        return Drive(unit(q), unit(k), v, beta=2 * beta if self.mixer.negative else beta, scale=self.scale)


class DeltaNetLayer(DeltaRuleLayer):
    """The layer of :class:`DeltaNet`."""

    def __init__(self, mixer: DeltaNet, place: Place) -> None:
        super().__init__(mixer, place)
        self.norm = nn.RMSNorm(self.values, eps=place.eps)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(self.norm(read)))


class DeltaNet(DeltaRuleMixer):
    """Read what a key holds, and write the difference to what it should hold: old content is replaced, not blurred.

    One step of gradient descent per token on the error of the memory. Without a new write under a like key nothing
    fades.
    """

    name = "delta-net"
    paper = Paper(
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        year=2024,
        arxiv="2406.06484",
        venue="NeurIPS 2024",
        code="https://github.com/fla-org/flash-linear-attention",
        equations="sections 2.2, 3.2 and 3.3 (the WY form); the rule is that of arXiv 2102.11174",
    )
    verdict = Verdict(
        "reproduced",
        "Of eight keys written twice the new value is recalled at 1.00; by gated linear attention at 0.44 to "
        "0.85 (3 seeds). Language modelling at scale was not looked at.",
    )
    forgets = "writing to a key takes away what it held"
    layer = DeltaNetLayer
