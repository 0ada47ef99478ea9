"""Aaren: attention as a recurrent neural network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from vestige.core.method import Paper, Verdict, param
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import Memory, RecurrentLayer, RecurrentMixer
from vestige.layers.ops.recurrence import exact
from vestige.layers.ops.softmax_scan import Pool, softmax_scan
from vestige.layers.parts import join_heads, split_heads
from vestige.layers.place import Place

__all__ = ["Aaren", "AarenLayer"]


class Scored(NamedTuple):
    """Scores ``(batch, length, heads)`` and values ``(batch, length, heads, dim)``."""

    scores: Tensor
    values: Tensor


class AarenLayer(RecurrentLayer):
    """The layer of :class:`Aaren`.

    It holds ``peak`` and ``weight``, ``(batch, heads)``, the largest score and the sum of weights relative to it; and
    ``total``, ``(batch, heads, dim)``, the weighted sum of values.
    """

    mixer: Aaren

    def __init__(self, mixer: Aaren, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, size = mixer.heads or place.heads, place.hidden_size
        self.query = nn.Parameter(torch.empty(size))
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def draw(self) -> None:
        init.normal_(self.query)  # as large as a token that comes out of a norm

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Scored:
        q = self.q_proj(self.query).unflatten(-1, (self.heads, -1))
        k, v = (split_heads(f(x), self.heads) for f in (self.k_proj, self.v_proj))
        scores = (q.to(exact(q)) * k).sum(-1) * k.shape[-1] ** -0.5
        return Scored(scores, v)

    def chunked(self, inputs: Scored, layout: Layout, memory: Memory) -> Float[Tensor, "batch length heads dim"]:
        pool = Pool(memory["peak"], memory["weight"], memory["total"]) if "peak" in memory else None
        chunk = min(self.mixer.chunk, 1 << (inputs.scores.shape[1] - 1).bit_length())
        read, pool = softmax_scan(*inputs, pool, valid=layout.valid, starts=layout.starts, chunk=chunk)
        memory.update(pool._asdict())
        return read

    def step(self, inputs: Scored, layout: Layout, memory: Memory) -> Float[Tensor, "batch 1 heads dim"]:
        scores, values = inputs.scores[:, 0], inputs.values[:, 0].to(exact(inputs.values))
        token = Pool(scores.detach(), (scores - scores.detach()).exp(), values)
        token = token._replace(total=values * token.weight[..., None])
        if layout.valid is not None:
            token = token.where(layout.valid.expand_as(scores))
        before = Pool(memory["peak"], memory["weight"], memory["total"]) if "peak" in memory else Pool.empty(values)
        pool = before.join(token)
        memory.update(pool._asdict())
        return pool.mean[:, None].to(inputs.values.dtype)

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(read))


class Aaren(RecurrentMixer):
    """Softmax attention of one learned query per layer: its past is three numbers and a vector per head.

    As the query does not depend on the token, scores of the past never have to be worked out again: the softmax is
    continued by the next token, and the softmaxes of all beginnings are one prefix scan. What a token asks for cannot
    be chosen, only what a layer looks out for. Nothing is forgotten, and each token's share falls as there are more.
    """

    name = "aaren"
    paper = Paper(
        title="Attention as an RNN",
        year=2024,
        arxiv="2405.13956",
        equations="sections 3.1 to 3.3: the recurrence, its prefix scan, and the learned query",
    )
    verdict = Verdict(
        "reproduced",
        "One pair among 60 tokens of noise is recalled at 1.00 from 160 bytes, by a sliding window of 3,840 bytes at "
        "0.32 to 0.36; of four pairs 0.40 to 0.42, by softmax attention, which can ask, 1.00 (3 seeds). The paper's "
        "tasks were not looked at.",
    )
    forgets = "nothing on purpose; the share of each token falls as more come"
    layer = AarenLayer

    heads: int | None = param(None, "heads; default: the model's", ge=1)

    def check_place(self, place: Place) -> None:
        self.share(place.hidden_size, self.heads or place.heads, "hidden_size")
