"""Attention as Titans have it beside their memory: over some tokens of the text, and over persistent ones."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from vestige.core.method import param
from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import Memory
from vestige.layers.mixers.titans import TitansMemory
from vestige.layers.ops.windowed_attention import windowed_attention
from vestige.layers.parts import join_heads, rotate, split_heads
from vestige.layers.place import Place

__all__ = ["PersistentAttention", "TitansBeside"]


class TitansBeside(TitansMemory):
    """Base of the uses of Titans' memory beside attention."""

    persistent: int = param(4, "learned tokens that attention always sees", ge=0)
    theta: float = param(10_000.0, "base of the wavelengths of the rotary positions", gt=1)

    def check_place(self, place: Place) -> None:
        super().check_place(place)
        heads = self.heads or place.heads
        dim = self.share(place.hidden_size, heads, "hidden_size")
        if dim % 2:
            raise SpecError(f"{self.name}: heads = {heads} of width {dim}, which is odd; rotary positions turn pairs")

    def check_window(self, window: int, place: Place) -> None:
        """Refuse a window longer than the context."""
        if window > place.context:
            raise SpecError(
                f"{self.name}: window = {window} is longer than the context of {place.context} tokens that the "
                f"model is made for (max_position_embeddings)"
            )


class PersistentAttention(nn.Module):
    """Queries, keys and values with rotary positions, and persistent tokens, which stand nowhere.

    A query has its channels twice: turned by the position for the text's tokens, and as they are for the persistent
    ones.
    """

    def __init__(self, size: int, heads: int, persistent: int, theta: float) -> None:
        super().__init__()
        self.heads, self.theta, self.scaling = heads, theta, (size // heads) ** -0.5
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.persistent = nn.Parameter(torch.empty(persistent, size)) if persistent else None

    def draw(self) -> None:
        if self.persistent is not None:
            init.normal_(self.persistent, std=1.0)

    def queries(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Queries of tokens, turned and as they are, ``(batch, heads, length, dim)``."""
        q = split_heads(self.q_proj(x), self.heads)
        return rotate(q, layout, self.theta).transpose(1, 2), q.transpose(1, 2)

    def entries(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of tokens, ``(batch, heads, length, dim)``."""
        k = rotate(split_heads(self.k_proj(x), self.heads), layout, self.theta)
        return k.transpose(1, 2), split_heads(self.v_proj(x), self.heads).transpose(1, 2)

    def always(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the persistent tokens, ``(heads, tokens, dim)``."""
        if self.persistent is None:
            return None
        k, v = (split_heads(f(self.persistent), self.heads).transpose(0, 1) for f in (self.k_proj, self.v_proj))
        return k, v

    def window(
        self, x: Float[Tensor, "batch length hidden"], layout: Layout, memory: Memory, window: int
    ) -> Float[Tensor, "batch length hidden"]:
        """Attend to the last tokens; ``memory`` keeps the ``keys`` and ``values`` of as many but one."""
        (turned, plain), (k, v), always = self.queries(x, layout), self.entries(x, layout), self.always()
        if "keys" in memory:
            k, v = torch.cat([memory["keys"], k], 2), torch.cat([memory["values"], v], 2)
        first = max(0, k.shape[2] - (window - 1))
        memory["keys"], memory["values"] = k[:, :, first:], v[:, :, first:]
        valid = None if layout.held is None else layout.held[:, layout.held.shape[1] - k.shape[2] :]
        read = windowed_attention(
            turned,
            k,
            v,
            window=window,
            scaling=self.scaling,
            valid=valid,
            sequence=layout.sequence,
            always=None if always is None else (plain, *always),
        )
        return join_heads(read.transpose(1, 2))

    def masked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Bool[Tensor, "rows length held"],
        always: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Attend to entries by a mask, and to the persistent tokens; queries are turned, and behind these as they are,
        where there are such tokens."""
        if always is not None:
            dim = k.shape[-1]
            more_k, more_v = (t.expand(k.shape[0], -1, -1, -1) for t in (F.pad(always[0], (dim, 0)), always[1]))
            k, v = torch.cat([more_k, F.pad(k, (0, dim))], 2), torch.cat([more_v, v], 2)
            seen = F.pad(seen, (more_k.shape[2], 0), value=True)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=self.scaling)
        return join_heads(read.transpose(1, 2))
