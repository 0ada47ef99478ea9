"""Expected attention: keep what queries still to come are expected to look at."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from vestige.context.attention import Look
from vestige.context.layer import EMPTY, KeptLayer, Step
from vestige.context.policy import Evict
from vestige.core.method import Paper, Verdict, param

__all__ = ["ExpectedAttention"]

BLOCK = 2048  # queries, or keys, worked on at once


class ExpectedAttention(Evict):
    r"""Keep entries by the attention that queries of a Gaussian distribution, at positions to come, pay them.

    Queries, their positions taken off, are taken to be Gaussian with the mean :math:`\mu` and covariance
    :math:`\Sigma` of those seen. With :math:`\bar R` the mean of the turns by the next positions and :math:`\tau` the
    factor of the logits, what query head *h* is expected to give entry *j*, before it is made to add up to one, is

    .. math:: z_{h,j} = \exp\left(\tau\, k_j^\top \bar R \mu_h
              + \tfrac{\tau^2}{2}\, k_j^\top \bar R \Sigma_h \bar R^\top k_j\right),

    and the score is the mean over the group of the shares, plus :math:`\epsilon`, times :math:`\lVert v_j \rVert`.

    The first tokens, whose queries and keys are out of line, are always kept and take no part. While decoding the
    statistics go on with every query; entries are dropped now and then, and ``lag`` is that interval. A soft cap on
    logits is not accounted for.
    """

    name = "expected-attention"
    paper = Paper(
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        year=2025,
        arxiv="2510.00636",
        code="https://github.com/NVIDIA/kvpress",
        equations="section 3: expected attention from mean and covariance of the queries under the mean turn",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 256 tokens cut to 40: what is kept gets 75% of the attention of later tokens, sinks and a "
        "window 60%; 0.35 nats from the whole cache's predictions, a plain window 1.4. A needle asked for "
        "only after the cut (512 tokens, half kept) is lost: 40% of its tokens are held, and where the filler"
        " repeats itself 67%, but only 54% in the heads that look for it",
    )

    sinks: int = param(4, "first tokens, always kept and left out of the statistics", ge=0)
    recent: int | float = param(0, "last tokens that are always kept: tokens (int), or a share of the budget", ge=0)
    lag: int = param(512, "decoding steps from one drop to the next; up to lag - 1 entries too many are held", ge=1)
    future: int = param(512, "positions to come over which queries are expected", ge=1)
    covariance: bool = param(True, "use the covariance of the queries, which takes memory of its own, or the mean only")
    epsilon: float = param(0.0, "added to the expected share of attention before values weigh it", ge=0)

    needs_rotary: ClassVar[bool] = True

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.when != "prefill"

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        """Bring the statistics of the queries, times the factor of the logits, up to date."""
        exact = torch.promote_types(look.query.dtype, torch.float32)
        for first in range(0, step.count, BLOCK):
            query = look.query[:, :, first : first + BLOCK].to(exact) * look.scaling
            counted, phase = self._queries(entries, step, first, query)
            if phase is not None:
                assert entries.cache.rotary is not None
                query = entries.cache.rotary.apply(query, phase)
            self._include(entries.aside, query, counted)

    def score(self, entries: KeptLayer) -> Tensor:
        mean, covariance = self._expected_queries(entries, entries.keys.shape[1])
        blocks = []
        for first in range(0, entries.slots, BLOCK):
            keys = entries.keys[:, :, first : first + BLOCK].to(mean.dtype)
            logits = mean @ keys.transpose(-1, -2)
            if covariance is not None:
                logits += (keys[:, :, None] @ covariance * keys[:, :, None]).sum(dim=-1) / 2
            blocks.append(logits)
        positions = entries._positions(entries.slots)
        left_out = (positions < self.sinks) | (positions == EMPTY)
        share = torch.cat(blocks, dim=-1).masked_fill(left_out[:, :, None], float("-inf")).log_softmax(dim=-1)
        share = share.logsumexp(dim=2) - math.log(mean.shape[2])  # of logarithms: small shares differ, too
        if self.epsilon:
            share = share.logaddexp(share.new_tensor(math.log(self.epsilon)))
        return share + torch.linalg.vector_norm(entries.values, dim=-1, dtype=mean.dtype).log()

    def _queries(
        self, entries: KeptLayer, step: Step, first: int, query: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Which queries of a block count, ``(batch, count)``, and the phase that takes their positions off."""
        known = f"queries from {first} on {query.device}"
        if known not in step.shared:
            last = first + query.shape[2]
            if step.positions is None:
                positions = torch.arange(step.start + first, step.start + last, device=query.device)[None]
            else:
                positions = step.positions[:, first:last].to(query.device)
            rotary = entries.cache.rotary
            phase = None if rotary is None else rotary.phase(-positions[:, None], query)
            step.shared[known] = (positions >= self.sinks).to(query.dtype).expand(len(query), -1), phase
        return step.shared[known]

    def _include(self, known: dict[str, Tensor], query: Tensor, counted: Tensor) -> None:
        """Add queries ``(batch, heads, count, dim)`` to the mean and to the sum of squares about it, row by row."""
        batch, heads, _, dim = query.shape
        if not known:
            known["counted"] = query.new_zeros(batch, 1, 1)
            known["mean"] = query.new_zeros(batch, heads, dim)
            if self.covariance:
                known["squares"] = query.new_zeros(batch, heads, dim, dim)
        weight = counted[:, None, :, None]
        fresh, before = counted.sum(dim=1)[:, None, None], known["counted"]
        mean = (query * weight).sum(dim=2) / fresh.clamp_min(1)
        total, apart = fresh + before, mean - known["mean"]
        if self.covariance:
            if query.shape[2] > 1:
                about = (query - mean[:, :, None]) * weight
                known["squares"] += about.transpose(-1, -2) @ about
            known["squares"] += apart[..., None] * (apart * (fresh * before / total.clamp_min(1)))[..., None, :]
        known["mean"] += apart * (fresh / total.clamp_min(1))
        known["counted"] = total

    def _expected_queries(self, entries: KeptLayer, kv_heads: int) -> tuple[Tensor, Tensor | None]:
        """Mean ``(batch, kv_heads, group, dim)`` and covariance ``(…, dim, dim)`` of the queries to come."""
        known, cache = entries.aside, entries.cache
        mean, covariance = known["mean"], known.get("squares")
        if covariance is not None:
            covariance = covariance / known["counted"].clamp_min(1)[..., None]
        if cache.rotary is not None:
            entering = cache.step is not None and cache.step.decoding  # the newest token's query is still to come
            ahead = torch.tensor(cache.real, device=mean.device) - int(entering)
            cosine, sine = cache.rotary.mean_phase(ahead, self.future, mean)
            mean = cache.rotary.apply(mean, (cosine[:, None], sine[:, None]))
            if covariance is not None:
                for _ in range(2):  # the columns, then the rows
                    phase = cosine[:, None, None], sine[:, None, None]
                    covariance = cache.rotary.apply(covariance.transpose(-1, -2), phase)
        by_group = (kv_heads, mean.shape[1] // kv_heads)
        return mean.unflatten(1, by_group), None if covariance is None else covariance.unflatten(1, by_group)
