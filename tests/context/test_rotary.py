"""Turning states by position, against the models' own rotary embeddings."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from transformers import CohereConfig, CohereModel, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from vestige.context.rotary import Rotary
from vestige.core import anatomy as known
from vestige.core.anatomy import Anatomy
from vestige.errors import UnsupportedModelError
from vestige.models.tiny import tiny_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def own_turn(model, states, positions):
    """What the model does to states that carry no position yet."""
    anatomy = Anatomy.of(model)
    apply = sys.modules[type(anatomy.layers[0].attention).__module__].apply_rotary_pos_emb
    cosine, sine = anatomy.base.rotary_emb(states, positions)
    return apply(states, states, cosine, sine)[0]


def models():
    yield "llama", tiny_model("llama")
    yield "mistral", tiny_model("mistral")
    yield "gpt-neox, a quarter turned", tiny_model("gpt-neox")
    yield "llama with yarn", LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN))


@pytest.mark.parametrize(("name", "model"), models())
def test_turns_on_back_and_off_as_the_model_does(name, model):
    anatomy = Anatomy.of(model)
    rotary = Rotary.of(anatomy)
    states = torch.randn(2, 3, 5, anatomy.head_dim, dtype=torch.float64)
    here = torch.tensor([[0, 1, 7, 40, 200], [3, 9, 10, 11, 12]])
    there = torch.tensor([[50, 1, 0, 41, 100], [0, 9, 30, 2, 12]])
    by = (there - here)[:, None]
    turned = rotary.turn(own_turn(model, states, here), by)
    torch.testing.assert_close(turned, own_turn(model, states, there), atol=1e-4, rtol=0)
    off = rotary.turn(own_turn(model, states, here), -here[:, None])
    torch.testing.assert_close(off, own_turn(model, states, torch.zeros_like(here)), atol=1e-4, rtol=0)


def test_turning_by_nothing_changes_no_bit():
    rotary = Rotary.of(Anatomy.of(tiny_model("llama")))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        states = torch.randn(1, 2, 5, 4).to(dtype)
        assert torch.equal(rotary.turn(states, 0), states)


def test_one_row_may_turn_and_another_not():
    rotary = Rotary.of(Anatomy.of(tiny_model("llama")))
    states = torch.randn(2, 3, 4, 4)
    turned = rotary.turn(states, torch.tensor([0, 9])[:, None, None])
    assert torch.equal(turned[0], states[0])
    torch.testing.assert_close(turned[1:], rotary.turn(states[1:], 9))


def test_the_mean_phase_turns_to_the_mean():
    model = tiny_model("gpt-neox", torch.float64)
    anatomy = Anatomy.of(model)
    rotary = Rotary.of(anatomy)
    state = torch.randn(1, 1, 1, anatomy.head_dim, dtype=torch.float64)
    mean = rotary.apply(state, rotary.mean_phase(torch.tensor(11), 6, state))
    due = torch.stack([rotary.turn(state, p) for p in range(11, 17)]).mean(dim=0)
    torch.testing.assert_close(mean, due, atol=1e-12, rtol=0)


def test_learned_positions_are_not_turned():
    assert Rotary.of(Anatomy.of(tiny_model("gpt2"))) is None


def test_unsupported_kinds_are_named():
    two = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["sliding_attention", "full_attention"]))
    with pytest.raises(UnsupportedModelError, match=r"gemma3_text.*each kind of layer"):
        Rotary.of(Anatomy.of(two))
    growing = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        Rotary.of(Anatomy.of(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=growing))))


def test_neighbouring_dimensions_paired_are_refused(monkeypatch):
    monkeypatch.setitem(known.ARCHITECTURES, "cohere", known.replace(known.LLAMA, norms={}))
    model = CohereModel(CohereConfig(**SIZES))
    with pytest.raises(UnsupportedModelError, match="halves of a head"):
        Rotary.of(Anatomy.of(model))


def test_the_model_is_not_held():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    rotary = Rotary.of(Anatomy.of(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and rotary.frequencies[0] == 1.0
