"""Claims of LazyEviction: entries that recur survive their silence, which ranking by the latest attention loses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vestige.context.attention import attend
from vestige.context.cache import KeptCache
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.evict.tova import TOVA
from vestige.context.policy import Evict
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

BUDGET, WINDOW = 32, 16
PROMPT, STEPS, RECURRING, DIM = 32, 200, 8, 64
BURST = 8  # steps for which a token that is looked at once goes on being looked at


@claim
def what_recurs_survives_its_silence(case: CacheCase) -> Seen:
    """Of entries that are looked at now and then, more are still there when their time comes than under TOVA.

    TOVA gets the same lag and the same protected window, so that both hold as much at any time.
    """
    lazy = case.on_lm(budget=BUDGET, lag=WINDOW, activity=0.02, sinks=0, recent=0)
    latest = TOVA(budget=BUDGET, lag=WINDOW, recent=WINDOW)
    window = StreamingLLM(budget=BUDGET, sinks=0, lag=WINDOW)
    there = {
        name: [still_there(policy, seed) for seed in case.seeds]
        for name, policy in (("lazy", lazy), ("tova", latest), ("window", window))
    }
    for mine, *others in zip(there["lazy"], there["tova"], there["window"], strict=True):
        expect(mine > 2 * max(others), f"recurring entries survive elsewhere, too: {there}")
    return there


@torch.no_grad()
def still_there(policy: Evict, seed: int) -> float:
    """Share of the activations of recurring entries that meet an entry which is still held.

    One attention head. Some entries of the prompt get a little attention every so many steps, each with its own
    period of less than a window; most attention goes to a token that has just come, for a few steps, and never again.
    """
    chance = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=chance)

    directions = torch.linalg.qr(torch.randn(DIM, DIM, generator=chance))[0][:RECURRING]
    who = torch.randperm(PROMPT, generator=chance)[:RECURRING]
    period = torch.randint(6, WINDOW, (RECURRING,), generator=chance)
    phase = (torch.rand(RECURRING, generator=chance) * period).long()
    keys = noise(PROMPT + STEPS, DIM)
    keys[who] = 6 * directions

    cache = KeptCache(policy, 1)
    module = nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]

    def step(query: Tensor, key: Tensor) -> None:
        cache.begin(1, len(key), None, key.device)
        cache.layers[0].update(key[None, None], key[None, None])
        assert cache.step is not None
        layer, now = cache.layers[0], cache.step
        attend(module, query[None, None], layer, scaling=1.0, policy=policy, step=now, watchers=[])  # type: ignore[arg-type]
        cache.step = None

    step(noise(PROMPT, DIM), keys[:PROMPT])
    met = asked = 0
    for t in range(STEPS):
        recurs = t % period == phase
        new = PROMPT + t
        burst = keys[new - t % BURST]
        query = noise(DIM) + directions[recurs].sum(dim=0) + 3 * burst / burst.norm()
        step(query[None], keys[new : new + 1])
        if t >= 2 * WINDOW:
            held = set(cache.positions(0).flatten().tolist())
            met += sum(int(entry) in held for entry in who[recurs])
            asked += int(recurs.sum())
    return met / asked
