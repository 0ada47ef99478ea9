"""Claims of ThinK: the channels that queries and keys make little use of can go."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.thin.think import QUERIES, ThinK
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import divergence
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

RATIO = 0.4


class _ByKeys(ThinK):
    """Channels by the keys alone."""

    def prepare(self, layer, keys, valid, rows):  # type: ignore[no-untyped-def]
        layer.aside[QUERIES] = torch.ones_like(layer.aside[QUERIES])
        super().prepare(layer, keys, valid, rows)


class _Anywhere(ThinK):
    """Channels at random."""

    def prepare(self, layer, keys, valid, rows):  # type: ignore[no-untyped-def]
        draw = torch.Generator().manual_seed(layer.index)
        energy: Tensor = torch.rand(keys.shape[3], generator=draw).to(layer.aside[QUERIES])
        layer.aside[QUERIES] = energy.expand_as(layer.aside[QUERIES])
        super().prepare(layer, torch.ones_like(keys), None, rows)


@claim(slow=True)
def channels_by_use_beat_channels_at_random(case: CacheCase) -> Seen:
    """With 40% of the channels gone predictions stay near the model's own; with as many gone at random they do not."""
    mine = divergence(case, case.on_lm(ratio=RATIO))
    chance = divergence(case, _Anywhere(ratio=RATIO, full_width=case.method.full_width))  # type: ignore[attr-defined]
    seen = {"divergence": mine.tolist(), "with channels at random": chance.tolist()}
    expect(bool((5 * mine < chance).all()), f"any channels do as well: {seen}")
    return seen


@claim(slow=True)
def queries_tell_more_than_keys_alone(case: CacheCase) -> Seen:
    """Channels chosen by queries and keys lose less than those chosen by the keys alone."""
    mine = divergence(case, case.on_lm(ratio=RATIO))
    keys = divergence(case, _ByKeys(ratio=RATIO, full_width=case.method.full_width))  # type: ignore[attr-defined]
    seen = {"divergence": mine.tolist(), "by keys alone": keys.tolist()}
    expect(float(mine.mean()) < float(keys.mean()), f"queries say nothing more: {seen}")
    return seen
