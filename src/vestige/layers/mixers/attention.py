"""What the softmax mixers share: queries, keys and values in groups of heads, rotary positions, norms."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vestige.core.method import param
from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer, MixerLayer
from vestige.layers.parts import rotate, split_heads
from vestige.layers.place import Place

__all__ = ["AttentionLayer", "AttentionMixer"]


class AttentionMixer(Mixer):
    """Base of mixers that attend to keys and values which they keep."""

    heads: int | None = param(None, "query heads; default: the model's", ge=1)
    kv_heads: int | None = param(None, "key-value heads, each for a group of query heads; default: the model's", ge=1)
    head_dim: int | None = param(None, "width of a head; default: the model's", ge=1)
    positions: Literal["rotary", "none"] = param("rotary", "how a key knows its place")
    theta: float = param(10_000.0, "base of the wavelengths of the rotary positions", gt=1)
    qk_norm: bool = param(False, "whether queries and keys are RMS-normalised per head")

    def sizes(self, place: Place) -> tuple[int, int, int]:
        """Query heads, key-value heads, width of a head.

        Raises:
            SpecError: numbers that do not divide, an odd width with rotary positions.
        """
        heads = self.heads or place.heads
        kv_heads = self.kv_heads or place.kv_heads or heads
        dim = self.head_dim or place.head_dim or self.share(place.hidden_size, heads, "hidden_size")
        if heads % kv_heads:
            raise SpecError(f"{self.name}: kv_heads = {kv_heads} does not divide heads = {heads}")
        if self.positions == "rotary" and dim % 2:
            raise SpecError(f"{self.name}: head_dim = {dim} is odd; rotary positions turn pairs")
        return heads, kv_heads, dim

    def check_place(self, place: Place) -> None:
        self.sizes(place)


class AttentionLayer(MixerLayer):
    """Queries, keys and values from the tokens, and the way back."""

    mixer: AttentionMixer

    def __init__(self, mixer: AttentionMixer, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, self.kv_heads, dim = mixer.sizes(place)
        self.num_key_value_groups = self.heads // self.kv_heads  # as transformers' attention functions read it
        self.scaling = dim**-0.5
        self.q_proj = nn.Linear(place.hidden_size, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(place.hidden_size, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(place.hidden_size, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, place.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=place.eps) if mixer.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim, eps=place.eps) if mixer.qk_norm else nn.Identity()

    def project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each ``(batch, heads, length, dim)``."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k = self.k_norm(split_heads(self.k_proj(x), self.kv_heads))
        v = split_heads(self.v_proj(x), self.kv_heads)
        if self.mixer.positions == "rotary":
            q, k = (rotate(t, layout, self.mixer.theta) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
