"""The checks of cache policies find what is wrong: each saboteur breaks one thing, and one check says so."""

from __future__ import annotations

import pytest
import torch

from vestige.context.cache import KeptCache
from vestige.context.evict.a2sf import A2SF
from vestige.context.evict.full import Full
from vestige.context.evict.h2o import H2O
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.kept import Kept
from vestige.core.patch import Patch
from vestige.evidence.certify import build_case, checks_of, perform
from vestige.evidence.certify.caching import BUDGET, CacheCase, differences, feed, held_bytes, snapshot
from vestige.evidence.certify.suite import NotApplicable


def outcome_of(method, name):
    """Run one check, found by its name."""
    check = next(c for c in checks_of(type(method)) if c.name == name)
    return perform(check, build_case(method))


class ForgetsTwice(A2SF):
    """Decays once too often."""

    def carry(self, fresh):
        return super().carry(2 * fresh)


class ForgetsNothing(A2SF):
    """Takes no notice of its factor in the prompt."""

    def query_weights(self, age):
        return torch.ones(age.shape, device=age.device)

    def horizon(self):
        return None


class DropsTheNewest(StreamingLLM):
    """Keeps the oldest instead of a window."""

    def recent_tokens(self, allowed):
        return 0

    def score(self, entries):
        return -super().score(entries)


class OneTooMany(H2O):
    """Holds one entry more than it says."""

    def budget_tokens(self, seen):
        return super().budget_tokens(seen) + 1


class NeverDrops(H2O):
    """Says that it drops, and keeps everything."""

    def acts(self, decoding):
        return False


class Draws(H2O):
    """Ranks by chance, another chance each time."""

    def score(self, entries):
        return torch.rand_like(super().score(entries))


class BatchMinded(H2O):
    """Ranks an entry against what the other rows of the batch hold."""

    def score(self, entries):
        mass = super().score(entries)
        return mass - mass.mean(dim=0, keepdim=True) * (len(mass) > 1)


@pytest.mark.parametrize(
    ("saboteur", "check"),
    [
        (ForgetsTwice(), "chunked prompts agree"),
        (ForgetsNothing(), "logits and positions agree"),
        (ForgetsNothing(), "sliding window layers agree"),
        (DropsTheNewest(), "logits and positions agree"),
        (DropsTheNewest(), "shares agree"),
        (OneTooMany(), "logits and positions agree"),
        (OneTooMany(), "the budget is never exceeded"),
        (OneTooMany(), "storage really shrinks"),
        (NeverDrops(), "each schedule agrees"),
        (NeverDrops(), "storage really shrinks"),
        (Draws(), "one generation does not touch the next"),
        (Draws(), "a fork goes its own way"),
        (Draws(), "cut is attaching with that budget"),
        (BatchMinded(), "left padded rows are as alone"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, H2O | A2SF | StreamingLLM) else value.replace(" ", "-"),
)
def test_a_wrong_policy_is_found_out(saboteur, check):
    outcome = outcome_of(saboteur, check)
    assert outcome.status == "failed", outcome.detail
    assert "Error" not in outcome.detail, f"the check broke instead of failing: {outcome.detail}"


def test_a_claim_of_fewer_bytes_is_found_out(monkeypatch):
    real = KeptCache.nbytes_by_part
    monkeypatch.setattr(KeptCache, "nbytes_by_part", lambda self: real(self) | {"state": 0})
    outcome = outcome_of(H2O(), "reported bytes are held")
    assert outcome.status == "failed" and "are held" in outcome.detail


def test_a_view_into_a_larger_storage_is_found_out(monkeypatch):
    """Entries that are only hidden still take their bytes."""
    from vestige.context.layer import KeptLayer

    real = KeptLayer.keep

    def hide(self, budgets, real_tokens=None):
        whole = self.keys
        real(self, budgets, real_tokens)
        slots = self.keys.shape[2]
        if whole.shape[2] > slots:
            whole[:, :, :slots] = self.keys
            self.keys = whole[:, :, :slots]

    monkeypatch.setattr(KeptLayer, "keep", hide)
    assert outcome_of(H2O(), "storage really shrinks").status == "failed"


@pytest.mark.parametrize("left", ["attribute", "hook", "config", "parameter", "patch"])
def test_what_is_left_behind_is_found_out(monkeypatch, left, tiny):
    real = Kept.undo
    cleanups = []

    def undo(self):
        if cleanups:
            return real(self)
        model = self._patch.model
        real(self)
        if left == "attribute":
            model.model.layers[1].left_over = 1
            cleanups.append(lambda: delattr(model.model.layers[1], "left_over"))
        elif left == "hook":
            cleanups.append(model.lm_head.register_forward_hook(lambda *a: None).remove)
        elif left == "config":
            model.config.use_cache = False
            cleanups.append(lambda: setattr(model.config, "use_cache", True))
        elif left == "parameter":
            with torch.no_grad():
                model.lm_head.weight.mul_(1.0)
            cleanups.append(lambda: None)
        else:
            cleanups.append(Patch(model, "left over").undo)

    monkeypatch.setattr(Kept, "undo", undo)
    try:
        outcome = outcome_of(H2O(), "nothing is left behind")
    finally:
        for cleanup in cleanups:
            cleanup()
    assert outcome.status == "failed" and "changed after a block" in outcome.detail


def test_other_outputs_after_the_block_are_found_out(monkeypatch):
    real = Kept.undo
    weights = []

    def undo(self):
        weight = self.anatomy.base.norm.weight if hasattr(self.anatomy.base, "norm") else None
        real(self)
        if weight is not None:
            weights.append((weight, weight.detach().clone()))
            with torch.no_grad():
                weight[0] *= 1.01

    monkeypatch.setattr(Kept, "undo", undo)
    try:
        outcome = outcome_of(H2O(), "outputs are bit identical")
    finally:
        with torch.no_grad():
            for weight, value in reversed(weights):
                weight.copy_(value)
    assert outcome.status == "failed" and "other outputs" in outcome.detail


def test_the_fitted_policy_binds_and_keeps_the_rest():
    case = CacheCase(A2SF(budget=4096, sinks=64, recent=512, forgetting=0.9))
    assert case.fitted == A2SF(budget=BUDGET, sinks=2, recent=3, forgetting=0.9)
    assert case.bounded
    identity = CacheCase(Full())
    assert identity.fitted == Full() and not identity.bounded
    with pytest.raises(NotApplicable, match="every entry"):
        identity.require_bounded()


def test_held_bytes_follow_references():
    class Box:
        pass

    box = Box()
    box.rows = [torch.zeros(4), {"more": (torch.zeros(2, dtype=torch.float64),)}]
    box.view = box.rows[0][:2]  # no storage of its own
    box.again = box
    box.model = torch.nn.Linear(9, 9)
    assert held_bytes(box) == 4 * 4 + 2 * 8


def test_snapshots_tell_what_changed(llama):
    before = snapshot(llama)
    assert differences(before, snapshot(llama)) == []
    handle = llama.model.register_forward_pre_hook(lambda *a: None)
    assert differences(before, snapshot(llama)) == ["hooks"]
    handle.remove()
    assert differences(before, snapshot(llama)) == []


def test_feeding_in_chunks_is_feeding_at_once(llama64, prompt):
    from transformers import DynamicCache

    parts = feed(llama64, prompt, [11, 1, 28], DynamicCache())
    with torch.no_grad():
        whole = llama64(prompt).logits
    torch.testing.assert_close(torch.cat(parts.logits, dim=1), whole)
