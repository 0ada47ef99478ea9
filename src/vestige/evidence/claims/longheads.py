"""Claims of LongHeads: heads find the chunks that they need, so that few chunks do for the whole text."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.select.longheads import LongHeads
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import divergence
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

SMALL = {"budget": 96, "chunk": 16}  # six chunks of the sixteen that a passage has


class _Anywhere(LongHeads):
    """Chunks at random in the place of those that heads choose."""

    def _choose(self, entries, text, at):  # type: ignore[no-untyped-def]
        chosen = super()._choose(entries, text, at)
        own = at.own[:, None, :, None].expand(*chosen.shape[:3], 1)
        draw = torch.Generator().manual_seed(entries.index)
        rank = torch.rand(*chosen.shape[:3], int(own.max()) + 1, generator=draw).to(chosen.device)
        middle = torch.arange(rank.shape[3], device=chosen.device)
        between = (middle > 0) & (middle < own - 1)
        some: Tensor = rank.masked_fill(~between, -1.0).topk(self.chunks - 3, dim=3).indices
        return torch.cat([torch.zeros_like(own), some, own - 1, own], dim=3).clamp_min(0).sort(dim=3).values


@claim(slow=True)
def heads_choose_better_than_chance(case: CacheCase) -> Seen:
    """Predictions are nearer to those that read everything than with chunks at random, the near ones always there."""
    mine = divergence(case, case.on_lm(**SMALL))
    chance = divergence(case, _Anywhere(**SMALL))
    seen = {"divergence": mine.tolist(), "with chunks at random": chance.tolist()}
    expect(bool((mine < chance).all()), f"any chunks do as well: {seen}")
    return seen


@claim(slow=True)
def chunks_beat_a_window(case: CacheCase) -> Seen:
    """Predictions are nearer to those that read everything than with sinks and a window as large as what is read."""
    mine = divergence(case, case.on_lm(**SMALL))
    streaming = divergence(case, StreamingLLM(budget=SMALL["budget"]))
    seen = {"divergence": mine.tolist(), "of sinks and window": streaming.tolist()}
    expect(float(mine.mean()) < float(streaming.mean()), f"sinks and window do as well: {seen}")
    return seen
