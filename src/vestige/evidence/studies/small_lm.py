"""A decoder small enough to be trained within seconds, whose way of attending can be taken apart.

What is compared in a study is one thing: how a layer mixes tokens. Everything else (norms, channel mixer, positions,
number of parameters, data, their order, optimiser) is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.errors import SpecError
from vestige.evidence.data.text import python_reference
from vestige.evidence.descent import descend

__all__ = ["Mixing", "SmallLM", "byte_text", "crops", "loss_on", "rotate", "train", "weights_of"]

Form = Literal["softmax", "sigmoid", "taylor", "gated"]
Source = Literal["hidden", "embedding", "random sequence", "fixed text", "none"]
APART = ("random sequence", "fixed text")  # sources that pass through the layers beside the text

THETA = 10_000.0  # base of the wavelengths of the rotary positions


@dataclass(frozen=True)
class Mixing:
    """How one layer mixes tokens.

    Attributes:
        form: how weights come from queries and keys; see :func:`weights_of`.
        source: what queries and keys are projected from: the layer's own input; the embeddings of the tokens; what the
            layers below have made of random vectors or of a piece of text, both the same whatever is read; or
            ``"none"``: no token sees another one.
    """

    form: Form = "softmax"
    source: Source = "hidden"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form) or self.source not in get_args(Source):
            raise SpecError(f"unknown mixing {self.form!r} from {self.source!r}")


def weights_of(
    q: Float[Tensor, "... queries dim"], k: Float[Tensor, "... keys dim"], form: Form
) -> Float[Tensor, "... queries keys"]:
    """Causal attention weights; with ``s = q k / sqrt(dim)``:

    - ``softmax``: ``exp(s)``, normalised to sum to one;
    - ``taylor``: ``1 + s + s^2 / 2``, which approximates ``exp(s)`` and is never negative, normalised;
    - ``gated``: ``exp(silu(q_i) k_i / sqrt(dim))`` of each token with itself, the same for all queries, normalised;
    - ``sigmoid``: ``1 / (1 + exp(-s))``, not normalised.
    """
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    if form == "gated":
        own = (F.silu(q) * k).sum(-1) / math.sqrt(q.shape[-1])
        s = own[..., None, :].expand(*own.shape, own.shape[-1])
    else:
        s = q @ k.mT / math.sqrt(q.shape[-1])
    if form in ("softmax", "gated"):
        return s.masked_fill(future, -torch.inf).softmax(-1)
    weights = (torch.sigmoid(s) if form == "sigmoid" else 1 + s + s.square() / 2).masked_fill(future, 0)
    return weights if form == "sigmoid" else weights / weights.sum(-1, keepdim=True)


class Mix(nn.Module):
    """One layer's mixing of tokens, ``4 hidden^2`` parameters whatever the kind."""

    def __init__(self, mixing: Mixing, hidden: int, heads: int) -> None:
        super().__init__()
        self.mixing, self.heads = mixing, heads
        self.qk = nn.Linear(hidden, 2 * hidden, bias=False)
        self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))

    def forward(self, x: Tensor, told: Tensor | None, seen: list[Tensor] | None) -> Tensor:
        """Mix ``x``; queries and keys come from ``told``. The weights are appended to ``seen``."""
        if told is None:  # the same parameters, token by token: a gated map instead of queries and keys
            a, b = self.qk(x).chunk(2, -1)
            return self.o(self.v(x) * F.silu(a) + b)
        q, k = (_heads(t, self.heads) for t in self.qk(told).chunk(2, -1))
        if self.mixing.form != "gated":  # there a token meets itself alone, at no distance
            q, k = rotate(q), rotate(k)
        weights = weights_of(q, k, self.mixing.form)
        if seen is not None:
            seen.append(weights)
        return self.o((weights @ _heads(self.v(x), self.heads)).transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Float[Tensor, "... length dim"]) -> Tensor:
    """Rotary positions: each pair ``(x_j, x_{j + dim/2})`` turned by position times ``theta^(-2j/dim)``."""
    half = x.shape[-1] // 2
    speed = THETA ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * speed
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nn.Module):
    """Mixing and channel mixer, added to the stream one after the other, or side by side."""

    def __init__(self, mixing: Mixing, hidden: int, heads: int, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.mix_norm, self.channel_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.mix = Mix(mixing, hidden, heads)
        self.channel = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, told: Tensor, apart: Tensor | None, seen: list[Tensor] | None) -> Tensor:
        """The stream after the layer.

        Args:
            x: the stream before it.
            told: embeddings of the tokens.
            apart: the stream of what is the same whatever is read, where there is one.
            seen: gets the weights.
        """
        normed = self.mix_norm(x)
        source = self.mix.mixing.source
        if source in APART:
            assert apart is not None
            told = self.mix_norm(apart).expand_as(x)
        elif source == "hidden":
            told = normed
        mixed = x + self.mix(normed, None if source == "none" else told, seen)
        return mixed + self.channel(self.channel_norm(x if self.parallel else mixed))


class SmallLM(nn.Module):
    """A decoder over bytes.

    Args:
        layers: how each layer mixes tokens.
        hidden: width.
        heads: attention heads.
        length: the most tokens that it reads.
        fixed_text: so many bytes, for layers whose queries and keys come from them.
        parallel: whether the channel mixer of a layer stands beside its mixing, so that it cannot undo it.
    """

    def __init__(
        self,
        layers: Sequence[Mixing],
        hidden: int,
        heads: int,
        length: int,
        *,
        fixed_text: Int[Tensor, " length"] | None = None,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.apart = next((mixing.source for mixing in layers if mixing.source in APART), None)
        if self.apart == "fixed text" and fixed_text is None:
            raise SpecError("layers that attend by a fixed text need one")
        self.embedding = nn.Embedding(256, hidden)
        self.layers = nn.ModuleList(Layer(mixing, hidden, heads, parallel) for mixing in layers)
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=1 if "embedding" in name else weight.shape[1] ** -0.5)
        for layer in self.layers:  # what is added to the stream grows with depth unless it begins smaller
            for last in (layer.mix.o.weight, layer.channel[2].weight):  # type: ignore[union-attr, index]
                nn.init.normal_(last, std=(2 * len(self.layers) * last.shape[1]) ** -0.5)  # type: ignore[arg-type, union-attr]
        self.register_buffer("random_sequence", torch.randn(length, hidden))
        self.register_buffer("fixed_text", fixed_text)

    def forward(self, ids: Int[Tensor, "batch length"], seen: list[Tensor] | None = None) -> Tensor:
        """Logits of the next byte, ``(batch, length, 256)``; the weights of each layer are appended to ``seen``."""
        x = told = self.embedding(ids)
        apart: Tensor | None = None
        if self.apart is not None:
            first = self.random_sequence if self.apart == "random sequence" else self.embedding(self.fixed_text)
            apart = first[None, : ids.shape[1]]  # type: ignore[index]
        for layer in self.layers:
            after = layer(x, told, apart, seen)
            apart = None if apart is None else layer(apart, told, apart, None)
            x = after
        return self.head(self.norm(x))


def byte_text(held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """The text that every Python brings along as bytes: to train on, and the end of it to look at."""
    text = torch.tensor(list("\n\n".join(python_reference()).encode()), dtype=torch.long)
    cut = round(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


def crops(text: Int[Tensor, " bytes"], rows: int, length: int, chance: torch.Generator) -> Int[Tensor, "rows length"]:
    """Pieces of a text that begin anywhere."""
    device = chance.device
    starts = torch.randint(len(text) - length + 1, (rows, 1), generator=chance, device=device)
    return text.to(device)[starts + torch.arange(length, device=device)]


def train(
    model: SmallLM,
    draw: Callable[[torch.Generator], Int[Tensor, "rows length+1"]],
    *,
    steps: int,
    rate: float,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train as :func:`~vestige.evidence.descent.descend` does.

    Args:
        draw: the texts of one step, from random numbers that are the same for the same seed.
        after: called after each step with the number of steps done.
    """

    def loss(chance: torch.Generator) -> Tensor:
        block = draw(chance).to(model.embedding.weight.device)
        return F.cross_entropy(model(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten())

    descend(model, loss, steps=steps, rate=rate, seed=seed, after=after)


@torch.no_grad()
def loss_on(model: SmallLM, blocks: Int[Tensor, "blocks length+1"], batch: int) -> float:
    """Mean loss, nats per byte, on texts that are each read from their beginning."""
    device, total = model.embedding.weight.device, 0.0
    for some in blocks.split(batch):
        some = some.to(device)
        losses = F.cross_entropy(model(some[:, :-1]).transpose(1, 2), some[:, 1:], reduction="none")
        total += losses.double().mean(1).sum().item()
    return total / len(blocks)
