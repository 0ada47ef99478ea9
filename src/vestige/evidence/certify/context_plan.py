"""Checks for plans: what holds for an evicting policy holds for it under a plan too, and the total is the budget."""

from __future__ import annotations

from typing import Any

import torch

from vestige.context.plan.sharing import Sharing
from vestige.core.anatomy import Anatomy
from vestige.errors import SpecError
from vestige.evidence.certify import context
from vestige.evidence.certify.caching import BUDGET, CacheCase, feed
from vestige.evidence.certify.context import CHUNKS, DECODED, PROMPT, against_reference, padded
from vestige.evidence.certify.context_input import refused
from vestige.evidence.certify.suite import Seen, Suite, expect

sharing = Suite(Sharing, case=CacheCase)

for check in context.evicting.checks:
    if check.point in ("reference", "invariance"):
        sharing.checks.append(check)


@sharing.check("reference")
def other_scores_agree(case: CacheCase) -> Seen:
    """The same over another score, and over another plan."""
    from vestige.context.evict.h2o import H2O
    from vestige.context.plan.adaptive import Adaptive
    from vestige.context.plan.pyramid import Pyramid

    other = Pyramid if isinstance(case.method, Adaptive) else Adaptive
    scores = [H2O(budget=BUDGET, sinks=2, recent=3), other(policy=H2O(budget=BUDGET))]  # type: ignore[operator]
    return {
        f"difference over {policy.name}": against_reference(case, case.method.replace(policy=policy), "llama", CHUNKS)
        for policy in scores
    }


@sharing.check("bytes")
def the_total_is_the_budget(case: CacheCase) -> Seen:
    """Over all layers and heads exactly the budget is held, after the prompt and at every step, in each row."""
    model = case.tiny("llama", torch.float32)
    anatomy = Anatomy.of(model)
    heads = anatomy.num_layers * anatomy.num_kv_heads
    most = 0
    for tokens, mask in ((case.tokens(2, PROMPT + DECODED), None), padded(case, (17, 26))):
        with case.fitted.attach(model) as kept:
            cache = kept.cache = kept.new_cache()
            for start, count in ((0, PROMPT), *((n, 1) for n in range(PROMPT, PROMPT + DECODED))):
                feed(
                    model,
                    tokens[:, start : start + count],
                    [count],
                    cache,
                    None if mask is None else mask[:, : start + count],
                )
                held = [_held(cache, row) for row in range(2)]
                due = [min(BUDGET, real) * heads for real in cache.real]
                expect(held == due, f"{held} entries are held after {start + count} tokens, where {due} are due")
            most = max(most, *held)
            parts = kept.nbytes_by_part
            entries, allowed = parts["keys"] + parts["values"], 2 * BUDGET * anatomy.cache_bytes_per_token()
            # Rows of different lengths may lie side by side, the shorter filled up with empty slots.
            expect(
                entries == allowed or mask is not None,
                f"keys and values take {entries} bytes, {BUDGET} entries per head {allowed}",
            )
            expect(kept.nbytes - entries < entries, f"what ranks the entries takes more than they do: {parts}")
    return {"entries": most, "bytes": kept.nbytes}


def _held(cache: Any, row: int) -> int:
    return sum(int((cache.positions(layer)[row] >= 0).sum()) for layer in range(len(cache.layers)))


@sharing.check("bad input")
def policies_that_cannot_be_planned_are_refused(case: CacheCase) -> Seen:
    """A policy that keeps every entry, or that turns keys by what is held, raises SpecError with its name."""
    from vestige.context.evict.streaming_llm import StreamingLLM
    from vestige.context.select.recycled_attention import RecycledAttention

    build = case.method.replace
    refused(SpecError, lambda: build(policy=RecycledAttention()), "policy", "recycled-attention")
    refused(SpecError, lambda: build(policy=StreamingLLM()), "policy", "streaming-llm")
    refused(SpecError, lambda: build(policy="pyramd"), "policy", "pyramd", "pyramid")
    return {"refused": 3}
