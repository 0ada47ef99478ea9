"""StreamingLLM counts positions inside the cache: what the certificate does not say of it."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import vestige
from vestige.context.rotary import Rotary
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import UnsupportedModelError
from vestige.models.tiny import tiny_model

BUDGET, SINKS = 10, 3


def streaming(**changes):
    return vestige.method("streaming-llm", **{"budget": BUDGET, "sinks": SINKS, **changes})


def read(model, kept, tokens, steps, mask=None):
    cache = kept.new_cache()
    for start, count in [(0, tokens.shape[1] - steps)] + [(tokens.shape[1] - steps + n, 1) for n in range(steps)]:
        extra = {} if mask is None else {"attention_mask": mask[:, : start + count]}
        if mask is not None:
            extra["position_ids"] = (extra["attention_mask"].cumsum(1) - 1).clamp_min(0)[:, -count:]
        model(tokens[:, start : start + count], past_key_values=cache, **extra)
    return cache


@torch.no_grad()
def test_sinks_stand_right_before_the_window():
    """In the first layer keys do not depend on what was dropped, so those of the text can be turned and compared."""
    model = tiny_model("llama", torch.float64)
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with vestige.method("full").attach(model) as kept:
        text = read(model, kept, tokens, 12).layers[0].keys
    with streaming().attach(model) as kept:
        cache = read(model, kept, tokens, 12)
    held = cache.positions(0)[0, 0].tolist()
    assert sorted(held) == [0, 1, 2, *range(40 - BUDGET + SINKS, 40)]
    rotary = Rotary.of(Anatomy.of(model))
    for slot, position in enumerate(held):
        due = text[:, :, position : position + 1]
        if position < SINKS:
            due = rotary.turn(due, 40 - BUDGET)
        torch.testing.assert_close(cache.layers[0].keys[:, :, slot : slot + 1], due, atol=1e-12, rtol=0)


@torch.no_grad()
def test_turning_again_and_again_does_not_drift():
    """In bfloat16 the sinks are after many steps what turning them once makes of them, to the bit."""
    model = tiny_model("llama", torch.bfloat16)
    tokens = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(1))
    with vestige.method("full").attach(model) as kept:
        came = read(model, kept, tokens[:, :SINKS], 0).layers[0].keys
    with streaming().attach(model) as kept:
        layer = read(model, kept, tokens, 100).layers[0]
    once = Rotary.of(Anatomy.of(model)).turn(came, 120 - BUDGET)
    assert torch.equal(layer.keys[:, :, :SINKS], once)
    assert torch.equal(layer.aside["sinks"], came)


@torch.no_grad()
def test_a_row_that_has_lost_nothing_is_not_touched():
    model = tiny_model("llama", torch.bfloat16)
    tokens = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :23] = 0  # seven tokens: below the budget
    with vestige.method("full").attach(model) as kept:
        whole = read(model, kept, tokens, 3, mask)
    with streaming().attach(model) as kept:
        cache = read(model, kept, tokens, 3, mask)
    for layer, plain in zip(cache.layers, whole.layers, strict=True):
        for position in range(7):
            here = (layer.positions[1, 0] == position).nonzero()[0, 0]
            there = (plain.positions[1, 0] == position).nonzero()[0, 0]
            assert torch.equal(layer.keys[1, :, here], plain.keys[1, :, there])
    turned = cache.layers[0].keys[0, :, 0] != whole.layers[0].keys[0, :, 0]
    assert bool(turned.any())


@torch.no_grad()
def test_sinks_are_seen_through_a_sliding_window():
    """Counted in the text they would lie outside the window of 20 tokens; counted in the cache they do not."""
    model = tiny_model("mistral", torch.float64)
    tokens = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(3))
    logits = {}
    for sinks in (0, SINKS):
        for reposition in (True, False):
            with streaming(sinks=sinks, budget=BUDGET - SINKS + sinks, reposition=reposition).attach(model) as kept:
                cache = kept.new_cache()
                model(tokens[:, :50], past_key_values=cache)
                logits[sinks, reposition] = [
                    model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(50, 60)
                ][-1]
    torch.testing.assert_close(logits[0, True], logits[0, False])
    torch.testing.assert_close(logits[SINKS, False], logits[0, False])
    assert not torch.allclose(logits[SINKS, True], logits[0, True], atol=1e-3)


def test_a_model_that_cannot_be_turned_is_refused_by_name_and_left_alone():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size": 97, "head_dim": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds, num_key_value_heads=2)).eval()
    with pytest.raises(UnsupportedModelError, match="gemma3_text"):
        streaming().attach(model)
    assert not Patch.active(model)
    with streaming(reposition=False).attach(model), torch.no_grad():
        model(torch.arange(3, 40)[None])
