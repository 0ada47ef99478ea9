"""Attention layers of a pretrained model taken over by another mixer: exactly, undoably, taught and kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vestige.core.anatomy import Anatomy
from vestige.errors import InputError, ModelError, PatchConflictError, PatchError, SpecError, UnsupportedModelError
from vestige.layers.mixers.gla import GLA
from vestige.layers.mixers.lizard import Lizard
from vestige.layers.mixers.sliding_window import SlidingWindow
from vestige.layers.mixers.softmax import Softmax
from vestige.models import load
from vestige.models.convert import FILE, ConvertedAttention, convert, restore
from vestige.models.distill import distill
from vestige.models.tiny import tiny_model, tiny_tokenizer

SMALL = Lizard(window=8, features=8, chunk=8)


def model_of(kind: str) -> torch.nn.Module:
    """A small model of the test's own."""
    if kind in ("qwen3", "gemma"):  # norms of heads; one key-value head of a width of its own
        sizes = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, pad_token_id=0)).eval()
    return copy.deepcopy(tiny_model(kind))


def ids(rows: int = 2, length: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def learnable(rows: int = 16, length: int = 24) -> torch.Tensor:
    """Text in which each token says which comes next."""
    start = torch.randint(0, 40, (rows, 1), generator=torch.Generator().manual_seed(1))
    return 3 + (start + 7 * torch.arange(length)) % 41


@pytest.mark.parametrize(
    ("kind", "mixer"),
    [("llama", Softmax()), ("mistral", SlidingWindow(window=20)), ("qwen3", Softmax()), ("gemma", Softmax())],
)
@torch.no_grad()
def test_the_same_mixer_changes_nothing(kind, mixer):
    """Softmax on the model's own projections, biases, norms, scaling and rotary positions is the model's attention:
    with padding, in pieces, and packed."""
    model, text = model_of(kind), ids()
    mask = torch.ones_like(text)
    mask[0, :9] = 0
    ends = torch.cat([torch.arange(11), torch.arange(19)])[None]
    calls = [
        lambda: model(text, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[mask.bool()],
        lambda: model(text[:1], position_ids=ends, use_cache=False).logits,
        lambda: model.generate(text, attention_mask=mask, max_new_tokens=6, do_sample=False).float(),
    ]
    before = [call() for call in calls]
    with convert(model, mixer):
        for call, due in zip(calls, before, strict=True):
            torch.testing.assert_close(call(), due, atol=2e-4, rtol=1e-4)
    for call, due in zip(calls, before, strict=True):
        assert torch.equal(call(), due)


def test_only_the_layers_named_and_undone_bit_for_bit():
    model, text = model_of("llama-deep"), ids()
    before, weights = model(text).logits, model.state_dict()
    swap = convert(model, SMALL, "1-2,4")
    assert swap.layers == (1, 2, 4)
    kinds = [isinstance(layer.attention, ConvertedAttention) for layer in Anatomy.of(model).layers]
    assert kinds == [False, True, True, False, True, False]
    assert not torch.allclose(model(text).logits, before)
    swap.undo()
    swap.undo()
    assert torch.equal(model(text).logits, before)
    assert list(model.state_dict()) == list(weights)
    assert not [m for m in model.modules() if m._forward_pre_hooks]
    with pytest.raises(RuntimeError), convert(model, SMALL):
        raise RuntimeError
    assert torch.equal(model(text).logits, before)


def test_generation_goes_on_from_bytes_that_do_not_grow():
    model, text = model_of("llama"), ids()
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    with convert(model, SMALL) as swap:
        held = []
        for count in (1, 9, 20):
            out = model.generate(
                text, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True
            )
            held.append(swap.nbytes(out.past_key_values))
        assert held[0] == held[1] == held[2] > 0
        for beams in (1, 3):
            search = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": beams}
            assert torch.equal(model.generate(text, **search), model.generate(text, use_cache=False, **search))
        alone = model.generate(text[:1, 5:], max_new_tokens=5, do_sample=False)[:, -5:]
        both = model.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False)[:1, -5:]
        assert torch.equal(alone, both)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_taught_in_two_stages_kept_and_undone(tmp_path, tune):
    """The attention is matched ever better, then text is predicted ever better; saved and loaded it is the same; the
    model as it was stands in the same folder, and comes back."""
    torch.manual_seed(0)
    model, text, given = model_of("llama"), learnable(), ids()
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    due = model(given).logits
    swap = convert(model, SMALL)
    told = []
    learnt = distill(
        swap,
        text,
        match_steps=20,
        tune_steps=20,
        match_rate=2e-2,
        tune_rate=2e-2,
        tune=tune,
        tell=lambda *what: told.append(what),
    )
    assert len(told) == 40 and len(learnt.match) == len(learnt.tune) == 20
    assert learnt.match[-1] < 0.8 * learnt.match[0]
    assert learnt.tune[-1] < 0.8 * learnt.tune[0]
    assert set(learnt.unmatched) == {0, 1}
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert model.training and not [name for name, _ in model.named_modules() if "lora" in name]
    changed = model(given).logits
    swap.save(tmp_path, tiny_tokenizer())
    assert (tmp_path / FILE).is_file() and not list(tmp_path.glob("*.bin"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(given).logits, due)
    loaded, _ = load(tmp_path)
    assert torch.equal(loaded(given).logits, changed)
    swap.undo()
    assert torch.equal(model(given).logits, due)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_first_stage_touches_only_what_attention_lacks():
    model = model_of("llama")
    swap = convert(model, SMALL, layers=[1])
    fresh = {id(weight) for weight in swap.modules[0].fresh()}
    before = {name: weight.clone() for name, weight in swap.weights().items()}
    distill(swap, ids(), match_steps=3, tune_steps=0, batch=2)
    for name, weight in swap.modules[0].layer.named_parameters():
        assert torch.equal(weight, before[f"1.{name}"]) == (id(weight) not in fresh)


def test_weights_in_half_precision_learn_by_small_steps():
    """Forty steps of at most 1e-4 from 1: each alone is less than what bfloat16 can tell apart."""
    model = model_of("llama").to(torch.bfloat16)
    swap = convert(model, SMALL, layers="1")
    features = swap.modules[0].layer.k_features
    before = features.detach().clone()
    distill(swap, ids(), match_steps=40, tune_steps=0, match_rate=1e-4)
    assert features.dtype == torch.bfloat16
    assert 0 < (features - before).abs()[before == 1].max() < 0.005


@pytest.mark.parametrize(
    ("layers", "mixer", "error", "words"),
    [
        ("2-29", SMALL, SpecError, "'2-29'; allowed: 'all', or layers 0 to 1"),
        (5, SMALL, SpecError, "5"),
        ("all", "gla", SpecError, "gla has projections of its own.*; allowed: lizard, "),
        ("all", GLA(), SpecError, "gla has projections of its own"),
        ("all", "lizzard", SpecError, "did you mean lizard"),
        ("all", Lizard(heads=4), SpecError, "heads = 4; the model's attention has 9"),
        ("all", Lizard(window=1000), SpecError, "window = 1000"),
    ],
)
def test_what_cannot_be_converted_is_said_first(layers, mixer, error, words):
    model = model_of("llama")
    due = model(ids()).logits
    with pytest.raises(error, match=words):
        convert(model, mixer, layers)
    assert torch.equal(model(ids()).logits, due)


def test_what_else_is_refused(tmp_path):
    for kind in ("gpt2", "opt", "gpt-neox", "bert"):
        with pytest.raises(UnsupportedModelError, match="cannot be converted"):
            convert(model_of(kind), SMALL)
    with pytest.raises(UnsupportedModelError, match="model is a tuple"):
        convert((model_of("llama"), tiny_tokenizer()), SMALL)
    model, text = model_of("llama"), ids()
    cache = model(text).past_key_values
    with pytest.raises(ModelError, match="no conversion can be read"):
        restore(model, tmp_path)
    swap = convert(model, SMALL)
    with pytest.raises(PatchError, match="converted already"):
        convert(model, SMALL)
    with pytest.raises(InputError, match="filled before"):
        model(text, past_key_values=cache)
    with pytest.raises(InputError, match="StaticLayer"):
        model.generate(text, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(InputError, match=r"\(batch, tokens\)"):
        model(text, attention_mask=torch.ones(2, 1, 30, 30))
    with pytest.raises(InputError, match="between the tokens of row 0"):
        model(text, attention_mask=torch.ones(2, 30).index_fill(1, torch.tensor([4]), 0))
    with pytest.raises(PatchConflictError, match="kv-cache"):
        __import__("vestige").method("h2o", budget=16).attach(model)
    swap.undo()
    with pytest.raises(InputError, match="undone"):
        distill(swap, text)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"match_steps": -1}, SpecError, "match_steps is -1"),
        ({"tune_rate": 0.0}, SpecError, "tune_rate"),
        ({"tune": "all"}, SpecError, "lora, full"),
        ({"ids": torch.zeros(3)}, InputError, "whole numbers"),
        ({"ids": torch.zeros(3, 1, dtype=torch.long)}, InputError, "two are the least"),
    ],
)
def test_distillation_checks_what_it_is_given(given, error, words):
    with convert(model_of("llama"), SMALL) as swap, pytest.raises(error, match=words):
        distill(swap, **{"ids": ids(), **given})
