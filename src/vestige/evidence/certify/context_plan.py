"""Checks for plans.

What holds for an evicting policy holds for it under a plan too, and the total is the budget. Heads with windows of
their own hold just those, and what was learnt of a model comes back from a file, and serves no other model.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from vestige.context.evict.h2o import H2O
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.plan.adaptive import Adaptive
from vestige.context.plan.passkeys import copies
from vestige.context.plan.pyramid import Pyramid
from vestige.context.plan.sharing import Sharing
from vestige.context.plan.windows import ALL, HeadWindows
from vestige.context.select.recycled_attention import RecycledAttention
from vestige.core.anatomy import Anatomy
from vestige.core.method import Method
from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.evidence.certify import context
from vestige.evidence.certify.caching import BUDGET, CacheCase, feed, learn
from vestige.evidence.certify.context import CHUNKS, DECODED, PROMPT, against_reference, padded
from vestige.evidence.certify.suite import Seen, Suite, expect, refused
from vestige.models.tiny import tiny_model

sharing = Suite(Sharing, case=CacheCase)
windows = Suite(HeadWindows, case=CacheCase)

for check in context.evicting.checks:
    if check.point in ("reference", "invariance"):
        sharing.checks.append(check)


@sharing.check("reference")
def other_scores_agree(case: CacheCase) -> Seen:
    """The same over a score that goes on while decoding, under every schedule, and over another plan."""
    other = Pyramid if isinstance(case.method, Adaptive) else Adaptive
    scores = {
        "h2o": H2O(budget=BUDGET, sinks=2, recent=3),
        "h2o while decoding": H2O(budget=BUDGET, when="decoding"),
        "h2o, lag of 3": H2O(budget=0.4, lag=3),
        f"{other.name} over h2o": other(policy=H2O(budget=BUDGET)),
    }
    return {
        f"difference over {name}": against_reference(case, case.method.replace(policy=policy), "llama", CHUNKS)
        for name, policy in scores.items()
    }


@sharing.check("bytes")
def the_total_is_the_budget(case: CacheCase) -> Seen:
    """Over all layers and heads exactly the budget is held, after the prompt and at every step, in each row."""
    model = case.tiny("llama", torch.float32)
    anatomy = Anatomy.of(model)
    heads = anatomy.num_layers * anatomy.num_kv_heads
    most = 0
    for policy in (case.fitted, case.method.replace(policy=H2O(budget=BUDGET))):  # type: ignore[call-arg]
        # A score that comes from prompts alone lets the cache grow while decoding.
        steps = range(PROMPT, PROMPT + DECODED) if policy.ranking.acts(decoding=True) else ()  # type: ignore[union-attr]
        for tokens, mask in ((case.tokens(2, PROMPT + DECODED), None), padded(case)):
            with policy.attach(model) as kept:
                cache = kept.cache = kept.new_cache()
                for start, count in ((0, PROMPT), *((n, 1) for n in steps)):
                    end = start + count
                    feed(model, tokens[:, start:end], [count], cache, None if mask is None else mask[:, :end])
                    held = [_held(cache, row) for row in range(len(tokens))]
                    due = [min(BUDGET, real) * heads for real in cache.real]
                    expect(held == due, f"{held} entries are held after {end} tokens, where {due} are due")
                most = max(most, *held)
                parts = kept.nbytes_by_part
                entries = parts["keys"] + parts["values"]
                allowed = len(tokens) * BUDGET * anatomy.cache_bytes_per_token()
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
    build = case.method.replace
    refused(SpecError, lambda: build(policy=RecycledAttention()), "policy", "recycled-attention")
    refused(SpecError, lambda: build(policy=StreamingLLM()), "policy", "streaming-llm")
    refused(SpecError, lambda: build(policy="pyramd"), "policy", "pyramd", "pyramid")
    return {"refused": 3}


@windows.check("bytes")
def each_head_holds_its_window(case: CacheCase) -> Seen:
    """After a long prompt each head stores what its rule allows and no more; while decoding, hardly any slots more."""
    model = case.tiny("llama", torch.float32)
    anatomy = Anatomy.of(model)
    policy = case.fitted.on(anatomy)
    per_entry = anatomy.cache_bytes_per_token() // (anatomy.num_layers * anatomy.num_kv_heads)
    tokens = case.tokens(2, 220)
    with policy.attach(model) as kept:
        cache = kept.cache = kept.new_cache()
        for seen, count in ((200, 200), *((n, 1) for n in range(201, 221))):
            feed(model, tokens[:, seen - count : seen], [count], cache)
            due = 0
            for layer in range(anatomy.num_layers):
                held = [len(head) for head in _positions(cache, layer)]
                allowed = [_limit(policy, window, seen) for window in policy.windows(layer, seen)]  # type: ignore[attr-defined]
                expect(held == allowed, f"after {seen} tokens layer {layer} holds {held}, where {allowed} are allowed")
                due += sum(allowed)
            stored = kept.nbytes_by_part["keys"] + kept.nbytes_by_part["values"]
            needed = 2 * due * per_entry
            room = needed if count > 1 else 1.5 * needed  # heads that grow have slots to spare
            expect(needed <= stored <= room, f"{stored} bytes are stored, where {2 * due} entries take {needed}")
    full = 2 * 220 * anatomy.cache_bytes_per_token()
    return {"stored": stored, "of a full cache": f"{stored / full:.1%}"}


def _positions(cache: Any, layer: int) -> list[list[int]]:
    """What the first row's heads hold."""
    return [[p for p in head if p >= 0] for head in cache.positions(layer)[0].tolist()]


def _limit(policy: Any, window: int | None, seen: int) -> int:
    return min(seen, ALL if window is None else policy.sinks + window)


@windows.check("invariance")
def a_saved_plan_comes_back(case: CacheCase) -> Seen:
    """Saved and loaded, the plan is equal, tables and all; so it is from its spec, and for the model in any dtype."""
    model = case.tiny("llama")
    plan = case.fitted.on(Anatomy.of(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "plan.safetensors"
        plan.save(path)  # type: ignore[attr-defined]
        again = type(plan).load(path)  # type: ignore[attr-defined]
        expect(again == plan, f"{plan!r} came back from its file as {again!r}")
        expect([p.name for p in path.parent.iterdir()] == [path.name], "saving leaves other files behind")
        expect(Method.from_spec(plan.to_json()) == plan, "the plan does not come back from its JSON")
        for dtype in (torch.float32, torch.bfloat16):
            with again.attach(case.tiny("llama", dtype)):
                pass
        size = path.stat().st_size
    return {"bytes": size}


@windows.check("bad input")
def plans_of_other_models_are_refused(case: CacheCase) -> Seen:
    """A plan of another model, or none at all, raises SpecError that says of which and what to do."""
    plan = case.fitted.on(Anatomy.of(case.tiny("llama")))
    other = tiny_model("llama", torch.float32, case.device, seed=1)
    for model in (other, case.tiny("qwen2")):
        refused(SpecError, lambda m=model: plan.attach(m), "fitted_on", "another model", "fit")  # type: ignore[misc]
    refused(SpecError, lambda: plan.replace(fitted_on=""), "fitted_on")  # type: ignore[attr-defined]
    name = plan.tables[0]  # type: ignore[attr-defined]
    uneven = ((0.5,), (0.5, 0.5))
    refused(SpecError, lambda: plan.replace(**{name: uneven}), name)  # type: ignore[attr-defined]
    small = dict.fromkeys(plan.tables, ((1.0,),))  # type: ignore[attr-defined]
    refused(SpecError, lambda: plan.replace(**small).attach(case.tiny("llama")), name, "layers")  # type: ignore[attr-defined]
    refused(SpecError, lambda: plan.with_budget(16), case.method.name, "budget")
    return {"refused": 6}


@windows.check("bad input")
def files_that_hold_no_plan_are_refused(case: CacheCase) -> Seen:
    """A file that is absent, or is no saved plan of this method, raises an error that names it."""
    from safetensors.torch import save_file

    load = type(case.fitted).load  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.safetensors"
        refused(InputError, lambda: load(path), "plan.safetensors")
        path.write_bytes(b"no tensors")
        refused(InputError, lambda: load(path), "plan.safetensors")
        save_file({"gates": torch.ones(2, 2)}, path)
        refused(InputError, lambda: load(path), "no saved plan")
        save_file({"gates": torch.ones(2, 2)}, path, metadata={"vestige": '{"name": "full"}'})
        refused(SpecError, lambda: load(path), "full")
    return {"refused": 4}


@windows.check("bad input")
def fitting_on_what_cannot_serve_is_refused(case: CacheCase) -> Seen:
    """Encoders, texts too short for windows to matter, and texts too long for the model are refused before any work."""
    fit = type(case.fitted).fit  # type: ignore[attr-defined]
    model = case.tiny("llama", torch.float32)
    before = context.snapshot(model)
    refused(UnsupportedModelError, lambda: fit(case.tiny("bert", torch.float32)), "bert")
    if case.method.name == "razor-attention":
        refused(InputError, lambda: fit(model, period=2), "too short")
        refused(InputError, lambda: fit(model, period=200), "too long")
        refused(SpecError, lambda: fit(model, repeats=1), "repeats")
    else:
        held = {"sinks": 8, "recent": 24}
        refused(InputError, lambda: fit(model, parameters=held, samples=copies(range(3, 97), 32, 2)), "too short", "32")
        refused(
            InputError, lambda: fit(model, parameters=held, samples=copies(range(3, 97), 300, 2)), "too long", "256"
        )
        refused(InputError, lambda: fit(model), "tokenizer", "samples")
        refused(InputError, lambda: fit(model, samples=[]), "samples")
    expect(not context.differences(before, context.snapshot(model)), "a refused fit changed the model")
    return {"refused": 5}


@windows.check("undo")
def fitting_leaves_the_model_as_it_was(case: CacheCase) -> Seen:
    """After a fit, and one that is interrupted, the model is as before: weights, hooks, config, training mode."""
    model = tiny_model("llama", torch.float32, case.device, seed=2)
    model.train()
    try:
        before = context.snapshot(model)
        learn(case.fitted, model)  # type: ignore[arg-type]
        expect(not context.differences(before, context.snapshot(model)), "a fit changed the model")

        def stop(done: int, of: int) -> None:
            raise KeyboardInterrupt

        how: dict[str, Any] = getattr(context.reference_of(case.method.name), "small_fit", dict)()
        with contextlib.suppress(KeyboardInterrupt):
            type(case.fitted).fit(model, parameters={"sinks": 2, "recent": 3}, progress=stop, **how)  # type: ignore[attr-defined]
        expect(not context.differences(before, context.snapshot(model)), "an interrupted fit changed the model")
    finally:
        model.eval()
    return {"fits": 2}
