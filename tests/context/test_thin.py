"""Policies that hold old entries compact: what they hold, over which policies, and how near it is."""

from __future__ import annotations

import pytest
import torch

import vestige
from vestige.context.thin.quantised_cache import QuantisedCache, dequantise, quantise
from vestige.context.thin.think import ThinK
from vestige.errors import SpecError
from vestige.evidence.certify.caching import feed, held_bytes, reference_run
from vestige.evidence.references import reference_of
from vestige.models.tiny import tiny_model

PROMPT, DECODED = 30, 14
CHUNKS = (PROMPT, *[1] * DECODED)
H2O = {"name": "h2o", "budget": 16, "sinks": 1, "recent": 2}


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(policy, model, ids, chunks, mask=None):
    with policy.attach(model) as kept:
        cache = kept.new_cache()
        return torch.cat(feed(model, ids, chunks, cache, mask, kept=False).logits, dim=1), cache


@pytest.mark.parametrize(
    "inner",
    [
        {"name": "full"},
        H2O,
        {**H2O, "when": "prefill"},
        {**H2O, "when": "decoding"},
        {**H2O, "budget": 0.6, "recent": 0.3},
        {**H2O, "lag": 3},
        {"name": "a2sf", "budget": 14, "forgetting": 0.8, "recent": 0},
    ],
)
@pytest.mark.parametrize("chunks", [CHUNKS, (11, 9, 1, 1, 10, *[1] * 12)])
@pytest.mark.parametrize("form", [ThinK(full_width=5, queries=8, ratio=0.5), QuantisedCache(full_width=5, bits=2)])
def test_over_each_policy_it_is_the_reference(form, inner, chunks):
    model, ids = tiny_model("llama", torch.float64), tokens(1, PROMPT + DECODED)
    policy = form.replace(policy=inner)
    due = reference_run(model, ids, chunks, reference_of(policy.name).simulate, policy)
    due = torch.cat(due.logits, dim=1)
    mine, _ = run(policy, model, ids, chunks)
    assert (mine - due).abs().max() < 1e-6
    alone, _ = run(policy.policy, model, ids, chunks)
    assert (alone - due).abs().max() > 1e-3, "nothing was made compact"


@pytest.mark.parametrize("form", [ThinK(full_width=5, queries=8, ratio=0.5), QuantisedCache(full_width=5)])
@pytest.mark.parametrize("inner", [{"name": "full"}, H2O, {**H2O, "budget": 0.6, "recent": 0.3, "when": "prefill"}])
def test_rows_are_as_alone(inner, form):
    """Rows whose prompts are shorter than the window choose their channels later, each by its own queries."""
    model, ids = tiny_model("llama", torch.float64), tokens(3, PROMPT + DECODED)
    mask = torch.ones_like(ids)
    mask[1, :26] = mask[2, :12] = 0
    policy = form.replace(policy=inner)
    together, cache = run(policy, model, ids, CHUNKS, mask)
    assert "recent queries" not in cache.layers[0].aside
    for row in range(3):
        pads = int((mask[row] == 0).sum())
        alone, _ = run(policy, model, ids[row : row + 1, pads:], (PROMPT - pads, *[1] * DECODED))
        assert (together[row, pads:] - alone[0]).abs().max() < 1e-6


def test_keys_take_the_bytes_of_their_channels():
    model, ids = tiny_model("llama", torch.float32), tokens(2, 120)
    _, cache = run(ThinK(full_width=8, ratio=0.5), model, ids, (100,))
    _, full = run(vestige.method("full"), model, ids, (100,))
    parts, whole = cache.nbytes_by_part(), full.nbytes_by_part()
    assert parts["values"] == whole["values"]
    assert parts["keys"] == whole["keys"] * (8 + 92 * 0.5) / 100
    assert cache.nbytes == held_bytes(cache)
    assert parts["state"] < 0.1 * whole["keys"]


def test_old_keys_are_not_made_wide_while_decoding(monkeypatch):
    def refuse(*args):
        raise AssertionError("keys were made wide")

    model, ids = tiny_model("llama", torch.float32), tokens(2, 60)
    with ThinK(policy=H2O, full_width=5, ratio=0.5).attach(model) as kept:
        cache = kept.new_cache()
        feed(model, ids[:, :31], [30, 1], cache, kept=False)
        monkeypatch.setattr(ThinK, "decode", refuse)
        feed(model, ids[:, 31:50], [1] * 19, cache, kept=False)


def test_a_plan_over_layers_goes_over_it():
    model, ids = tiny_model("llama-deep", torch.float64), tokens(1, PROMPT + DECODED)
    plan = vestige.method("pyramid", policy=ThinK(policy=H2O, full_width=5, ratio=0.5))
    exact = vestige.method("pyramid", policy=ThinK(policy=H2O, full_width=5, ratio=0.0))
    thinned, cache = run(plan, model, ids, CHUNKS)
    whole, _ = run(exact, model, ids, CHUNKS)
    plain, _ = run(vestige.method("pyramid", policy=H2O), model, ids, CHUNKS)
    assert len({layer.slots for layer in cache.layers}) > 1
    assert (whole - plain).abs().max() < 1e-6 < 1e-3 < (thinned - plain).abs().max()


def test_a_cut_cache_is_compact_and_its_own():
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    policy = ThinK(policy={**H2O, "budget": 1.0}, full_width=5, ratio=0.5)
    with policy.attach(model) as kept:
        whole = kept.new_cache()
        feed(model, ids[:, :PROMPT], [PROMPT], whole)
        before = whole.nbytes
        for budget in (12, PROMPT):
            cut = whole.cut(budget)
            assert held_bytes([whole, cut]) == before + cut.nbytes
            assert cut.layers[0].slots == budget and cut.layers[0].window_keys.shape[2] == 5
            feed(model, ids[:, PROMPT:], [1] * DECODED, cut)
        assert whole.nbytes == before and whole.get_seq_length() == PROMPT


@pytest.mark.parametrize(
    "inner, word",
    [
        ({"name": "recycled-attention"}, "recycled-attention"),
        ({"name": "streaming-llm", "budget": 64}, "streaming-llm"),
        ({"name": "adaptive"}, "unequal"),
        ({"name": "think"}, "think"),
        ({"name": "h2o", "budget": 32}, "full_width"),
    ],
)
def test_policies_that_cannot_be_held_compact_are_refused(inner, word):
    with pytest.raises(SpecError, match=word):
        ThinK(policy=inner)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dim, group", [(64, 32), (64, 64), (80, 32), (6, 4), (5, 2)])
def test_codes_are_the_nearest_and_take_their_bits(bits, dim, group):
    states = torch.randn(2, 3, 7, dim, generator=torch.Generator().manual_seed(0))
    rows = quantise(states, bits, group)
    back = dequantise(rows, bits, group, dim, torch.float32)
    groups = -(-dim // group)
    width = -(-dim // groups)
    step = rows[..., -4:-2].contiguous().view(torch.float16).float().expand(*rows.shape[:-1], width)
    assert ((back - states).abs() <= step.flatten(-2)[..., :dim] * 0.5 + 2e-3).all()
    assert rows.shape[-2:] == (groups, -(-width * bits // 8) + 4) and rows.dtype == torch.uint8


@pytest.mark.parametrize("bits", [4, 2])
def test_one_operation_each_way_does_the_same(bits):
    """On the CPU torch has operations of its own for these rows, by another order of rounding."""
    states = torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0))
    rows, plain = quantise(states, bits, 32), quantise(states.double(), bits, 32)
    same = (rows == plain)[..., :-4].float().mean()
    assert same > 0.999 and torch.equal(rows[..., -4:], plain[..., -4:])
    back = dequantise(plain, bits, 32, 64, torch.float32)
    assert (back - dequantise(plain, bits, 32, 64, torch.float64)).abs().max() < 1e-6


def test_equal_channels_stay_equal():
    states = torch.full((1, 1, 2, 8), 3.0)
    assert torch.equal(dequantise(quantise(states, 4, 4), 4, 4, 8, torch.float32), states)


@pytest.mark.parametrize("bits, bound", [(8, 0.05), (4, 0.7)])
def test_more_bits_are_nearer(bits, bound):
    model, ids = tiny_model("llama", torch.float32), tokens(2, PROMPT + DECODED)
    rounded, _ = run(QuantisedCache(full_width=5, bits=bits, group=2), model, ids, CHUNKS)
    plain, _ = run(vestige.method("full"), model, ids, CHUNKS)
    error = (rounded - plain)[:, PROMPT:].abs().mean() / plain[:, PROMPT:].abs().mean()
    assert 0 < error < bound


def test_entries_that_stay_old_keep_their_codes():
    """Dropping others, in a chunk and while decoding, rounds nothing a second time."""
    model, ids = tiny_model("llama", torch.float32), tokens(1, 60)
    policy = QuantisedCache(policy={**H2O, "lag": 2}, full_width=4, bits=2, group=2)
    with policy.attach(model) as kept:
        cache = kept.new_cache()
        codes: dict[tuple[int, int], torch.Tensor] = {}
        same = 0
        for start, count in ((0, 25), (25, 10), *((n, 1) for n in range(35, 60))):
            feed(model, ids[:, start : start + count], [count], cache)
            layer, now = cache.layers[0], {}
            for head in range(3):
                for slot in range(layer.old_slots):
                    position = int(layer.positions[0, head, slot])
                    now[head, position] = layer.form["keys"][0, head, slot].clone()
            for entry in codes.keys() & now.keys():
                assert torch.equal(codes[entry], now[entry])
                same += 1
            codes = now
    assert same > 300
