r"""Blocks of a rule whose steps are brought to equal size in every direction, by Muon's iteration :math:`T`.

It is a polynomial of a matrix and its products with itself, so for a tall S it is :math:`T(S) = S N(S^\top S)`, and for
a wide one :math:`N(S S^\top) S`, with N a function of a small square matrix. Of the S of a slot,

.. math:: S_t = e_t S - X^\top \operatorname{diag}(H_t) D ,

that matrix follows from :math:`S^\top S`, :math:`X S` and :math:`X X^\top` (or, where it is wide, the same of the
transposed), which a block needs once. So neither S nor its step is ever made for a slot: answers are rows times small
matrices.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vestige.layers.ops.learning.blocks import Blocks
from vestige.layers.ops.learning.lessons import taught
from vestige.layers.ops.learning.rules import Brain, Pages, Rule, Slow
from vestige.layers.ops.learning.steps import Features, equaliser, newton_schulz

__all__ = ["by_muon"]

MATRICES = 5  # that an iteration leaves for its derivative
MOST_LEFT = 1 << 32  # bytes


def by_muon(
    rule: Rule, slow: Slow, feature: Features | None, pages: Pages, blocks: Blocks, brain: Brain, newborn: Brain
) -> tuple[Float[Tensor, "count batch heads slots dim"], Brain]:
    """Let blocks teach a memory, one after the other, and answer their queries.

    The iteration leaves dozens of matrices behind: where they are many, a block is worked out again in the backward
    pass.
    """
    read = []
    left = blocks.count * rule.muon * MATRICES * sum(min(t.shape[-2:]) ** 2 * t[..., 0, 0].nbytes for t in brain.total)
    again = torch.is_grad_enabled() and (not rule.by_block or left > MOST_LEFT)
    for n in range(blocks.count):
        if blocks.fresh:
            brain = newborn.pick(blocks.fresh[n], brain)
        given = rule, slow, feature, pages.at(n), brain, blocks.full[n]
        if again:
            found, brain = checkpoint(_block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            found, brain = _block(*given)
        read.append(found)
    return torch.stack(read), brain


def _block(
    rule: Rule, slow: Slow, feature: Features | None, page: Pages, brain: Brain, full: bool | Tensor
) -> tuple[Tensor, Brain]:
    read, after = _taught(rule, slow, feature, page, brain)
    return read, _refreshed(rule, after, full)


def _taught(rule: Rule, slow: Slow, feature: Features | None, page: Pages, brain: Brain) -> tuple[Tensor, Brain]:
    memory = rule.memory
    x, z = (slow.seen(feature, t) for t in (page.k, page.q))
    batch, heads = page.v.shape[:2]
    bound = None if page.bound is None else page.bound.flatten(0, 1)
    k, v, gain = page.k.flatten(0, 1), page.v.flatten(0, 1), slow.gain.repeat(batch, 1, 1)
    point = [weights.flatten(0, 1) for weights in brain.point]
    found = taught(memory, rule.bias, x.flatten(0, 1), k, v, bound, gain, point)
    pairs = [(inputs.unflatten(0, (batch, heads)), slope.unflatten(0, (batch, heads))) for inputs, slope in found]
    if rule.by_block:
        read, _ = memory.run(z, page.q, slow.gain, lambda index, t: t @ brain.point[index])
        return read, _moved(page, brain, pairs)
    layers = [_Layer(rule, page, brain, index, *pair) for index, pair in enumerate(pairs)]
    read, _ = memory.run(z, page.q, slow.gain, lambda index, t: layers[index].answer(t))
    after = [layer.after() for layer in layers]
    return read, Brain([total for total, _ in after], brain.point, [surprise for _, surprise in after])


class _Layer:
    """A layer of a memory within a block. S, or its transposed, is tall: ``(long, short)``."""

    def __init__(self, rule: Rule, page: Pages, brain: Brain, index: int, inputs: Tensor, slope: Tensor) -> None:
        assert page.along is not None
        self.page, self.along, self.inputs, self.slope = page, page.along[..., None, None], inputs, slope
        self.total, self.surprise = brain.total[index], brain.surprise[index]
        self.tall = inputs.shape[-1] > slope.shape[-1]
        held = self.surprise if self.tall else self.surprise.mT
        long, short = (inputs, slope) if self.tall else (slope, inputs)
        self.weighed = page.heap[..., None] * short[:, :, None]  # (batch, heads, slots, rows, short)
        met = (long @ long.mT)[:, :, None] @ self.weighed
        half = self.weighed.mT @ (met / 2 - self.along * (long @ held)[:, :, None])
        square = self.along.square() * (held.mT @ held)[:, :, None] + half + half.mT
        self.equal = equaliser(square, rule.muon)  # N of each slot

    def answer(self, z: Float[Tensor, "batch heads slots inputs"]) -> Float[Tensor, "batch heads slots outputs"]:
        """What it answers to each slot's input with the weights at that slot."""
        found = self.page.into[..., None] * (z @ self.total)
        take = self.page.take.mT[..., None]  # of the S of a slot, by those that ask
        if self.tall:
            met = self.along * (z @ self.surprise)[:, :, None] - (z @ self.inputs.mT)[:, :, None] @ self.weighed
            return found + (take * (met @ self.equal)).sum(2)
        turned = take * (z[:, :, None] @ self.equal)
        rows = (turned @ self.weighed.mT).sum(2)
        return found + (self.along * turned).sum(2) @ self.surprise - rows @ self.slope

    def after(self) -> tuple[Tensor, Tensor]:
        """A and S at the last slot."""
        left, _, along = self.page.left[..., None, None].unbind(0)
        last = self.page.take[..., -1, :, None, None]
        turn, rows = (last * self.along * self.equal).sum(2), (last * (self.weighed @ self.equal)).sum(2)
        if self.tall:
            total = left * self.total + self.surprise @ turn - self.inputs.mT @ rows
        else:
            total = left * self.total + turn @ self.surprise - rows.mT @ self.slope
        return total, along * self.surprise - self.inputs.mT @ (self.page.pile[..., None] * self.slope)


def _moved(page: Pages, brain: Brain, pairs: list[tuple[Tensor, Tensor]]) -> Brain:
    """What is held after a block whose step is taken at its end."""
    left, _, along = page.left[..., None, None].unbind(0)
    total = [held * left for held in brain.total]
    surprise = [
        along * held - inputs.mT @ (page.pile[..., None] * slope)
        for held, (inputs, slope) in zip(brain.surprise, pairs, strict=True)
    ]
    assert brain.due is not None
    due = brain.due * page.left[0] + page.take[..., -1, :].sum(-1)
    return Brain(total, brain.point, surprise, due)


def _refreshed(rule: Rule, brain: Brain, full: bool | Tensor) -> Brain:
    """At the end of a block, slopes are taken at the weights of then."""
    if full is False:
        return brain
    total, due = brain.total, brain.due
    if due is not None:
        total = [
            a + due[..., None, None] * newton_schulz(s, rule.muon) for a, s in zip(total, brain.surprise, strict=True)
        ]
        due = torch.zeros_like(due)
    after = Brain(total, [rule.retention.weights(part) for part in total], brain.surprise, due)
    return after if full is True else after.pick(full, brain)  # type: ignore[arg-type]
