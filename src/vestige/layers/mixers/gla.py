"""Gated linear attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, LinearMixer, Memory
from vestige.layers.ops.recurrence import Drive, exact
from vestige.layers.parts import GatedHeadNorm, join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["GLA", "GLALayer"]


class GLALayer(LinearLayer):
    """The layer of :class:`GLA`. It holds ``S``, ``(batch, heads, keys, values)``."""

    mixer: GLA

    def __init__(self, mixer: GLA, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, keys, values = mixer.sizes(place)
        size = place.hidden_size
        self.scale = keys**-0.5
        self.q_proj = nn.Linear(size, self.heads * keys, bias=False)
        self.k_proj = nn.Linear(size, self.heads * keys, bias=False)
        self.v_proj = nn.Linear(size, self.heads * values, bias=False)
        self.decay = nn.Sequential(
            nn.Linear(size, mixer.rank, bias=False), nn.Linear(mixer.rank, self.heads * keys, bias=True)
        )
        self.g_proj = nn.Linear(size, self.heads * values, bias=False)
        self.norm = GatedHeadNorm(values, place.eps)
        self.o_proj = nn.Linear(self.heads * values, size, bias=False)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        q, k, v, a = (split_heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj, self.decay))
        decay = F.logsigmoid(a.to(exact(a))) / self.mixer.temperature
        return Drive(q, k, v, decay, scale=self.scale, bounded=self.mixer.temperature >= 1)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(self.norm(read, split_heads(self.g_proj(x), self.heads))))


class GLA(LinearMixer):
    """A matrix state whose every key channel fades at a rate of its own, chosen by each token."""

    name = "gla"
    paper = Paper(
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        year=2023,
        arxiv="2312.06635",
        venue="ICML 2024",
        code="https://github.com/fla-org/flash-linear-attention",
        equations="section 4.1, equations 3 and 4; sections 4.3 and 4.4",
    )
    verdict = Verdict(
        "reproduced",
        "Of keys written twice the new value is recalled more often than by linear attention, which cannot "
        "tell old from new (claims, 3 seeds). Language modelling at scale was not looked at.",
    )
    forgets = "each key channel fades at a rate that the token chooses"
    layer = GLALayer

    expand_k: float = param(0.5, "width of all keys over the hidden size", gt=0)
    expand_v: float = param(1.0, "width of all values over the hidden size", gt=0)
    rank: int = param(16, "rank of the map from a token to its decays", ge=1)
    temperature: float = param(16.0, "divides the logarithm of the decay: the greater, the longer is remembered", gt=0)

    def sizes(self, place: Place) -> tuple[int, int, int]:
        """Heads, keys per head, values per head."""
        heads = self.heads or place.heads
        keys = self.share(self.expand_k * place.hidden_size, heads, "expand_k * hidden_size")
        return heads, keys, self.share(self.expand_v * place.hidden_size, heads, "expand_v * hidden_size")

    def check_place(self, place: Place) -> None:
        self.sizes(place)
