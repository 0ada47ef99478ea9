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

    def _score(self, entries, text, at):  # type: ignore[no-untyped-def]
        score: Tensor = super()._score(entries, text, at)
        draw = torch.Generator().manual_seed(entries.index)
        return torch.rand(score.shape, generator=draw).to(score)


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
