"""What a memory that learns is told, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.retentions import Retention
from vestige.layers.ops.learning.steps import FeatureName, Features

__all__ = ["Brain", "Lesson", "Pages", "Rule", "Slow"]


@dataclass(frozen=True)
class Rule:
    """What kind of memory it is, and how it learns.

    Attributes:
        memory: the network.
        bias: the loss.
        retention: how its weights follow from what is added up.
        refresh: tokens after which slopes are taken at the weights of then.
        window: the last tokens whose slopes a token adds.
        muon: iterations that bring a step to equal size in every direction; 0: none.
        by_block: whether queries are answered with the weights at the beginning of their block.
        feature, degree: what the first layer sees of keys and queries: see
            :class:`~vestige.layers.ops.learning.steps.Features`.
    """

    memory: Perceptron = field(default_factory=Perceptron)
    bias: Bias = field(default_factory=Bias)
    retention: Retention = field(default_factory=Retention)
    refresh: int = 16
    window: int = 1
    muon: int = 0
    by_block: bool = False
    feature: FeatureName = "none"
    degree: int = 1


@dataclass(frozen=True)
class Lesson:
    """What tokens teach and ask.

    Attributes:
        q, k, v: ``(batch, length, heads, dim)``.
        rate: theta, how much a token's slope counts.
        decay: logarithm of alpha, at most 0.
        momentum: logarithm of eta, at most 0; ``None``: the sum of slopes is begun anew with each token.
        step: lambda, how much of that sum is added; ``None``: all.
        bound: beyond which error the loss of the rule grows more slowly, if it does.
    """

    q: Float[Tensor, "batch length heads dim"]
    k: Float[Tensor, "batch length heads dim"]
    v: Float[Tensor, "batch length heads dim"]
    rate: Float[Tensor, "batch length heads"]
    decay: Float[Tensor, "batch length heads"]
    momentum: Float[Tensor, "batch length heads"] | None = None
    step: Float[Tensor, "batch length heads"] | None = None
    bound: Float[Tensor, "batch length heads"] | None = None

    def to(self, kind: torch.dtype) -> Lesson:
        """The same in another type."""
        return replace(self, **{f.name: t.to(kind) for f in fields(self) if (t := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class Slow:
    """What the memory has from training: it is the same for every text.

    Attributes:
        start: for each layer ``(heads, inputs, outputs)`` what the rule begins with.
        gain: ``(heads, 1, dim)`` of the network's norm.
        scale: of features, by their degree.
    """

    start: Sequence[Float[Tensor, "heads inputs outputs"]]
    gain: Float[Tensor, "heads 1 dim"]
    scale: Float[Tensor, " degrees"] | None = None

    def to(self, kind: torch.dtype) -> Slow:
        """The same in another type."""
        scale = None if self.scale is None else self.scale.to(kind)
        return Slow([weight.to(kind) for weight in self.start], self.gain.to(kind), scale)

    def seen(self, feature: Features | None, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... inputs"]:
        """What the first layer sees of keys or queries."""
        return x if feature is None or self.scale is None else feature(x, self.scale)


@dataclass
class Brain:
    """What is held: for each layer ``(batch, heads, inputs, outputs)``.

    Attributes:
        total: A, which fades and is added to.
        point: the weights at the beginning of the block, where slopes are taken.
        surprise: S, if there is momentum.
        due: ``(batch, heads)`` how much of the block's step is to be added at its end, where that is done at once.
    """

    total: list[Tensor]
    point: list[Tensor]
    surprise: list[Tensor] = field(default_factory=list)
    due: Tensor | None = None

    def pick(self, rows: Bool[Tensor, " batch"], other: Brain) -> Brain:
        """This in some rows, another in the rest."""

        def one(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        def each(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [one(a, b) for a, b in zip(mine, theirs, strict=True)]

        due = None if self.due is None or other.due is None else one(self.due, other.due)
        total, point = each(self.total, other.total), each(self.point, other.point)
        return Brain(total, point, each(self.surprise, other.surprise), due)

    def write(self, held: dict[str, Tensor]) -> None:
        """Put it among the named tensors of a state."""
        for name, parts in (("total", self.total), ("point", self.point), ("surprise", self.surprise)):
            held.update({f"{name}.{index}": part for index, part in enumerate(parts)})
        if self.due is not None:
            held["due"] = self.due


@dataclass(frozen=True)
class Pages:
    """The blocks of a lesson, or some, or one; ``rows`` are a block's slots and what it sees of the past.

    Attributes:
        q: ``(count, batch, heads, slots, dim)``; k, v: ``(count, batch, heads, rows, dim)``; bound: ``(count, batch,
            heads, rows)``.
        into: ``(count, batch, heads, slots)`` how much of A there was before is left in A at each slot; carry: and of S
            in A; along: and of S in S.
        within: ``(count, batch, heads, slots, rows)`` R, how much of each slope is in A; heap: H, and in S.
        take: ``(count, batch, heads, slots, slots)`` how much of each slot's S is in A.
        left: ``(count, 1 or 3, batch, heads)`` into, carry and along, at the last slot; share, pile: ``(count, batch,
            heads, rows)`` within and heap, there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bound: Tensor | None
    into: Tensor
    carry: Tensor | None
    along: Tensor | None
    within: Tensor
    heap: Tensor
    take: Tensor
    left: Tensor
    share: Tensor
    pile: Tensor

    def at(self, which: int | slice) -> Pages:
        """Some of the blocks, or one, without the first dimension."""
        return self._each(lambda name, t: t[which])

    def flat(self) -> Pages:
        """The heads of all rows one after the other, as one dimension."""
        return self._each(lambda name, t: t.flatten(1 + (name == "left"), 2 + (name == "left")))

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Pages:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Pages(**{name: None if t is None else change(name, t) for name, t in parts.items()})
