"""Softmax means of all beginnings of a sequence, by a prefix scan.

What a softmax over some tokens needs to be continued is a triple: the largest score, the sum of the weights, and the
weighted sum of the values, both relative to it. Joining two triples is associative, so the triples of all beginnings
are one prefix scan: within chunks by a matrix of weights, across chunks by doubling. Sums are in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.ops.recurrence import exact, has_kernels

__all__ = ["Pool", "chunked_scan", "softmax_scan"]

LEAST = -1e30
"""The largest score of no tokens at all: finite, so that no difference of two of them is undefined."""


class Pool(NamedTuple):
    """The triple. ``peak`` and ``weight`` are ``(...)``, ``total`` is ``(..., values)``."""

    peak: Tensor
    weight: Tensor
    total: Tensor

    @classmethod
    def empty(cls, like: Float[Tensor, "... values"]) -> Self:
        """Of no tokens."""
        none = torch.zeros_like(like[..., 0])
        return cls(none.fill_(LEAST), torch.zeros_like(none), torch.zeros_like(like))

    def join(self, later: Pool) -> Pool:
        """Of the tokens of both. The peaks cancel out of every mean, so no gradient runs through them."""
        peak = torch.maximum(self.peak, later.peak)
        mine, theirs = (self.peak - peak).exp(), (later.peak - peak).exp()
        total = self.total * mine[..., None] + later.total * theirs[..., None]
        return Pool(peak, self.weight * mine + later.weight * theirs, total)

    def where(self, kept: Bool[Tensor, ...]) -> Pool:
        """The pool where it is kept, and an empty one elsewhere."""
        total = self.total * kept[..., None]
        return Pool(self.peak.masked_fill(~kept, LEAST), self.weight * kept, total)

    @property
    def mean(self) -> Float[Tensor, "... values"]:
        """The weighted mean of the values; zero for no tokens."""
        return self.total / torch.where(self.weight > 0, self.weight, 1)[..., None]


def softmax_scan(
    scores: Float[Tensor, "batch length heads"],
    values: Float[Tensor, "batch length heads values"],
    before: Pool | None = None,
    *,
    valid: Bool[Tensor, "batch length"] | None = None,
    starts: Bool[Tensor, "batch length"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads values"], Pool]:
    """The mean of all values up to each token, weighted by ``softmax`` of the scores.

    Args:
        before: the pool of earlier tokens, ``(batch, heads)``; ``None``: there are none.
        valid: tokens that count.
        starts: tokens at which another packed sequence begins, with nothing before it.
        chunk: tokens per chunk of the portable form. Work grows with it, memory for the chunks' pools falls with it.

    Returns:
        The means, in the values' type, and the pool of all tokens.
    """
    if has_kernels(values):
        from vestige.layers.ops.softmax_scan_triton import softmax_scan_cuda

        return softmax_scan_cuda(scores, values, before, valid, starts)
    return chunked_scan(scores, values, before, valid=valid, starts=starts, chunk=chunk)


def chunked_scan(
    scores: Float[Tensor, "batch length heads"],
    values: Float[Tensor, "batch length heads values"],
    before: Pool | None = None,
    *,
    valid: Bool[Tensor, "batch length"] | None = None,
    starts: Bool[Tensor, "batch length"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads values"], Pool]:
    """The same on any device; arguments and results as :func:`softmax_scan`."""
    kind, length = exact(values), scores.shape[1]
    scores = scores.to(kind)
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None], -torch.inf)
    s, v = _fold(scores, chunk, -torch.inf), _fold(values.to(kind), chunk, 0.0)  # (batch, chunks, chunk, heads, ...)
    s, v = s.permute(0, 3, 1, 2), v.permute(0, 3, 1, 2, 4)  # (batch, heads, chunks, chunk, ...)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=s.device).triu(1)
    hidden, fresh, broken = future, None, None
    if starts is not None:
        sequence = _fold(starts.long(), chunk, 0).cumsum(-1)[:, None]  # (batch, 1, chunks, chunk)
        hidden = future | (sequence[..., :, None] != sequence[..., None, :])
        fresh, broken = sequence == 0, sequence[..., -1] > 0
    seen = s[..., None, :].masked_fill(hidden, -torch.inf)
    peak = seen.detach().amax(-1).clamp_min(LEAST)
    weights = (seen - peak[..., None]).exp()
    within = Pool(peak, weights.sum(-1), weights @ v)
    carried = _exclusive(Pool(peak[..., -1], within.weight[..., -1], within.total[..., -1, :]), broken, before)
    history = Pool(carried.peak[..., :-1, None], carried.weight[..., :-1, None], carried.total[..., :-1, None, :])
    if fresh is not None:
        history = Pool(*(t.expand(*within.peak.shape, *t.shape[4:]) for t in history)).where(fresh)
    means = history.join(within).mean
    out = means.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(values.dtype), Pool(carried.peak[..., -1], carried.weight[..., -1], carried.total[..., -1, :])


def _exclusive(chunks: Pool, broken: Bool[Tensor, "batch 1 chunks"] | None, before: Pool | None) -> Pool:
    """What stands before each chunk, and after the last: ``(batch, heads, chunks + 1)``, by doubling the reach.

    Args:
        broken: chunks in which a packed sequence begins: what came before does not reach beyond them.
    """
    first = Pool.empty(chunks.total[:, :, 0]) if before is None else before
    reached = Pool(*(torch.cat([a.unsqueeze(2), b], 2) for a, b in zip(first, chunks, strict=True)))
    count = reached.peak.shape[2]
    stops = None if broken is None else F.pad(broken, (1, 0)).expand_as(reached.peak)
    step = 1
    while step < count:
        earlier = Pool(*(t[:, :, :-step] for t in reached))
        later = Pool(*(t[:, :, step:] for t in reached))
        if stops is not None:
            earlier = earlier.where(~stops[:, :, step:])
            stops = torch.cat([stops[:, :, :step], stops[:, :, step:] | stops[:, :, :-step]], 2)
        joined = earlier.join(later)
        reached = Pool(*(torch.cat([a[:, :, :step], b], 2) for a, b in zip(reached, joined, strict=True)))
        step *= 2
    return reached


def _fold(tensor: Tensor, chunk: int, fill: float) -> Tensor:
    """``(batch, length, ...)`` as ``(batch, chunks, chunk, ...)``."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing], value=fill)
    return tensor.unflatten(1, (-1, chunk))
