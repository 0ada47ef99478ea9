"""Checks for cache policies: bad input gives a clear error before anything is done."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from vestige.context.policy import CachePolicy, Evict
from vestige.errors import InputError, PatchConflictError, PatchError, SpecError, UnsupportedModelError
from vestige.evidence.certify.caching import CacheCase, differences, feed, snapshot
from vestige.evidence.certify.suite import Seen, Suite, expect, refused

policies = Suite(CachePolicy, case=CacheCase)
evicting = Suite(Evict, case=CacheCase)


@policies.check("bad input")
def models_without_a_cache_are_refused(case: CacheCase) -> Seen:
    """Encoders, and what is no model at all, raise UnsupportedModelError; the model stays as it was."""
    for architecture, name in (("bert", "bert"), ("vit", "vit")):
        model = case.tiny(architecture, torch.float32)
        before = snapshot(model)
        refused(UnsupportedModelError, lambda model=model: case.fitted.attach(model), name)  # type: ignore[misc]
        expect(not differences(before, snapshot(model)), f"a refused {architecture} model was changed")
    refused(UnsupportedModelError, lambda: case.fitted.attach(torch.nn.Linear(2, 2)), "Linear")
    return {"refused": 3}


@policies.check("bad input")
def a_second_policy_is_refused(case: CacheCase) -> Seen:
    """A second attachment raises PatchConflictError naming the first, which works on; after undo it may come."""
    model, tokens = case.tiny("llama", torch.float32), case.tokens(1, 20)
    with case.fitted.attach(model) as kept:
        alone = feed(model, tokens, [20], kept.new_cache())
        refused(PatchConflictError, lambda: case.fitted.attach(model), case.method.name, "cache")
        after = feed(model, tokens, [20], kept.new_cache())
        expect(torch.equal(alone.last, after.last), "a refused second attachment changed the first")
        expect(alone.kept == after.kept, "a refused second attachment changed what the first keeps")
    with case.fitted.attach(model):
        pass
    return {"refused": 1}


@policies.check("bad input")
def a_foreign_cache_is_refused(case: CacheCase) -> Seen:
    """A cache that was filled without the policy raises PatchError; an empty one may come."""
    model, tokens = case.tiny("llama", torch.float32), case.tokens(1, 8)
    foreign = DynamicCache()
    feed(model, tokens, [8], foreign)
    with case.fitted.attach(model):
        refused(PatchError, lambda: feed(model, tokens, [8], foreign), case.method.name)
        feed(model, tokens, [8], DynamicCache())
    return {"refused": 1}


@policies.check("bad input")
def a_wrong_mask_is_refused(case: CacheCase) -> Seen:
    """An attention mask of another length, or one that is not (batch, tokens), raises InputError; nothing is stored."""
    model, tokens = case.tiny("llama", torch.float32), case.tokens(2, 8)
    masks = [tokens.new_ones(2, 5), tokens.new_ones(2, 11), tokens.new_ones(2, 1, 8, 8)]
    with case.fitted.attach(model) as kept, torch.no_grad():
        for mask in masks:
            cache = kept.new_cache()
            refused(InputError, lambda m=mask, c=cache: model(tokens, attention_mask=m, past_key_values=c), "mask")  # type: ignore[misc]
            expect(cache.get_seq_length() == 0 and cache.nbytes == 0, "a refused pass left something in the cache")
    return {"refused": len(masks)}


@policies.check("bad input")
def asking_too_early_or_amiss_is_refused(case: CacheCase) -> Seen:
    """Positions before the first pass, or of a layer that is not there, raise InputError."""
    model = case.tiny("llama", torch.float32)
    with case.fitted.attach(model) as kept:
        refused(InputError, lambda: kept.positions(0), "run the model")
        feed(model, case.tokens(1, 8), [8], kept.new_cache())
        refused(InputError, lambda: kept.positions(99), "99", "layer")
        refused(InputError, lambda: kept.positions(-1), "-1", "layer")
    return {"refused": 3}


@evicting.check("bad input")
def budgets_that_cannot_be_are_refused(case: CacheCase) -> Seen:
    """A share above one, or a budget that does not hold sinks and recent tokens, raises SpecError with the numbers."""
    case.require_bounded()
    build = case.fitted.replace
    refused(SpecError, lambda: build(budget=1.5), "budget", "1.5")
    refused(SpecError, lambda: build(recent=1.5), "recent", "1.5")
    refused(SpecError, lambda: build(budget=16, sinks=17, recent=0), "budget", "16", "17")
    refused(SpecError, lambda: build(budget=16, sinks=4, recent=13), "budget", "16", "17")
    build(budget=16, sinks=4, recent=12)
    model = case.tiny("llama", torch.float32)
    with case.variant(budget=1.0).attach(model) as kept:
        cache = kept.new_cache()
        feed(model, case.tokens(1, 20), [20], cache)
        for budget in (0, -3, 1.5, "half"):
            refused(SpecError, lambda b=budget: cache.cut(b), "budget", str(budget))  # type: ignore[misc]
        expect(cache.positions(0).shape[-1] == 20, "a refused cut changed the cache")
    return {"refused": 8}
