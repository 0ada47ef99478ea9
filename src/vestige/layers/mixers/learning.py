"""What the mixers whose memory learns while it reads have in common: what is projected, gated, begun with, and read."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from vestige.core.method import param
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.mixers.recurrent import Memory, RecurrentLayer
from vestige.layers.ops.learning.engine import Lesson, Rule, Slow, learn
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.steps import width_of
from vestige.layers.ops.recurrence import exact
from vestige.layers.parts import GatedHeadNorm, ShortConvolution, join_heads, split_heads, unit
from vestige.layers.place import Place

__all__ = ["ConvolvedMixer", "LearningLayer", "LearningMixer"]

EASE = 16.0
"""What the logarithm of the decay is divided by: a memory keeps most of what it holds unless told otherwise."""

GATE_BIAS = {"decay": 2.0, "rate": 0.0, "momentum": 0.0, "step": 0.0, "bound": 1.0}


class LearningMixer(Mixer):
    """Base of mixers whose heads each hold a small network that learns, token by token, to answer keys with values.

    A state holds three copies of the network's weights, or two where there is no momentum: those that slopes are taken
    at, those of now, and the running sum of slopes.

    """

    forgets = "a memory's weights decay by a gate of the token; what is learnt anew overwrites what it contradicts"

    heads: int | None = param(None, "heads; default: the model's", ge=1)
    depth: int = param(2, "layers of the memory; 1: a matrix", ge=1)
    expand: int = param(4, "width between the memory's layers over that of a head", ge=1)
    residual: bool = param(True, "whether an answer is the query plus the memory's normalised output")
    refresh: int = param(16, "tokens after which slopes are taken at the memory's weights of then", ge=1)
    rate: float = param(0.1, "the most that a token's slope counts", gt=0)

    def check_place(self, place: Place) -> None:
        self.share(place.hidden_size, self.heads or place.heads, "hidden_size")

    def gates(self) -> tuple[str, ...]:
        """What each token and head says of the rule: names of :class:`~vestige.layers.ops.learning.engine.Lesson`."""
        return ("decay", "rate")

    def scales(self, degree: int) -> list[float]:
        """What features of each order, from none to the highest, begin to be multiplied with."""
        return [1 / math.factorial(order) for order in range(degree + 1)]

    @abstractmethod
    def rule(self) -> Rule:
        """What kind of memory it is, and how it learns."""

    def network(self) -> Perceptron:
        """The memory's architecture."""
        return Perceptron(depth=self.depth, expand=self.expand, residual=self.residual)


class ConvolvedMixer(LearningMixer):
    """The same with a short convolution before it."""

    conv: int = param(4, "tokens that the short convolution of queries, keys and values spans; 0: none", ge=0)


class LearningLayer(RecurrentLayer):
    """The layer of such a mixer.

    It holds ``total.i``, ``point.i`` and perhaps ``surprise.i``, ``(batch, heads, inputs, outputs)`` of the memory's
    layer i; ``filled``, tokens of the block begun; ``conv``; and what the rule's window keeps: ``key``, ``value``,
    ``rate``, ``(batch, window - 1, heads, ...)``.
    """

    mixer: LearningMixer

    def __init__(self, mixer: LearningMixer, place: Place) -> None:
        super().__init__(mixer, place)
        size = place.hidden_size
        self.heads = mixer.heads or place.heads
        self.dim = size // self.heads
        self.rule, self.gates = mixer.rule(), mixer.gates()
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        taps = getattr(mixer, "conv", 0)
        self.conv = ShortConvolution(3 * size, taps) if taps else None
        self.gate_proj = nn.Linear(size, len(self.gates) * self.heads, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(len(self.gates) * self.heads))
        inputs = width_of(self.rule.feature, self.dim, self.rule.degree)
        shapes = self.rule.memory.shapes(inputs, self.dim)
        self.memory = nn.ParameterList(torch.empty(self.heads * outputs, inputs) for inputs, outputs in shapes)
        self.memory_norm = nn.Parameter(torch.empty(size)) if self.rule.memory.residual else None
        self.feature_scale = nn.Parameter(torch.empty(self.rule.degree + 1)) if self.rule.feature != "none" else None
        self.build_exit(place)

    def build_exit(self, place: Place) -> None:
        """The modules that :meth:`finish` needs."""
        self.g_proj = nn.Linear(place.hidden_size, place.hidden_size, bias=False)
        self.norm = GatedHeadNorm(self.dim, place.eps)
        self.o_proj = nn.Linear(place.hidden_size, place.hidden_size, bias=False)

    def draw(self) -> None:
        bias = [GATE_BIAS[name] for name in self.gates]
        init.copy_(self.gate_bias, torch.tensor(bias).repeat_interleave(self.heads).to(self.gate_bias))
        for weight in self.memory:
            spread = 1.0 if self.rule.retention.name == "kl" else weight.shape[1] ** -0.5
            init.normal_(weight, std=spread)
        if self.memory_norm is not None:
            init.ones_(self.memory_norm)
        if self.feature_scale is not None:
            init.copy_(self.feature_scale, torch.tensor(self.mixer.scales(self.rule.degree)).to(self.feature_scale))

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Lesson:
        parts = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        if self.conv is None:
            parts = F.silu(parts)
        else:
            parts, memory["conv"] = self.conv(parts, layout, memory.get("conv"))
        q, k, v = (split_heads(part, self.heads) for part in parts.chunk(3, -1))
        return self.lesson(unit(q), unit(k), v, x, layout.valid)

    def lesson(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, valid: Tensor | None) -> Lesson:
        """What tokens teach and ask; their gates are read off ``x``. Padding teaches nothing and lets nothing fade."""
        raw = self.gate_proj(x)
        raw = (raw.to(exact(raw)) + self.gate_bias.to(exact(raw))).unflatten(-1, (len(self.gates), self.heads))
        gates = {name: self.gate(name, raw[:, :, index]) for index, name in enumerate(self.gates)}
        if valid is not None:
            away = ~valid[..., None]
            gates = {name: gate.masked_fill(away, 0) for name, gate in gates.items()}
        return Lesson(q, k, v, **gates)

    def gate(self, name: str, raw: Float[Tensor, "batch length heads"]) -> Float[Tensor, "batch length heads"]:
        """One of the rule's gates."""
        if name == "decay":
            return F.logsigmoid(raw) / EASE
        if name == "momentum":
            return F.logsigmoid(raw)
        if name == "bound":
            return F.softplus(raw)
        return torch.sigmoid(raw) * (self.mixer.rate if name == "rate" else getattr(self.mixer, "step", 1.0))

    def slow(self) -> Slow:
        """The memory that every text begins with."""
        start = [weight.unflatten(0, (self.heads, -1)).mT for weight in self.memory]
        gain = self.gate_bias.new_ones(1) if self.memory_norm is None else self.memory_norm
        gain = (
            gain.expand(self.heads * self.dim).view(self.heads, 1, self.dim) * self.dim**-0.5
        )  # keys are of length one
        return Slow(start, gain, self.feature_scale)

    def chunked(self, inputs: Lesson, layout: Layout, memory: Memory) -> Float[Tensor, "batch length heads dim"]:
        return learn(self.rule, self.slow(), inputs, memory, valid=layout.valid, starts=layout.starts)

    step = chunked  # a single token is a block of one slot

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(self.norm(read, split_heads(self.g_proj(x), self.heads))))
