"""Anatomy: the parts it names are those with which the model itself computes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.masking_utils import eager_mask

from tests.tiny import DECODERS, FAMILIES, build, token_ids
from vestige.core import Anatomy, Patch
from vestige.core.anatomy import ARCHITECTURES
from vestige.errors import SpecError, UnsupportedModelError

BARE = list(FAMILIES)


def bare(family: str, **changes: Any) -> nn.Module:
    return build(family, "", **changes)


def run(model: nn.Module) -> None:
    """One forward pass over a left-padded batch (images for ViT) in which rotations are the identity."""
    if model.config.model_type == "vit":
        model(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2)))
        return
    ids = token_ids(model, batch=2, length=7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    # At position 0 a rotation changes nothing, so that queries and keys arrive as they were projected.
    model(ids, attention_mask=mask, position_ids=torch.zeros_like(ids))


captured: dict[int, dict[str, Any]] = {}


def capturing_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    batch, heads, length, width = query.shape
    output = torch.randn(batch, length, heads, width, generator=torch.Generator().manual_seed(3))
    scaling = width**-0.5 if scaling is None else scaling
    captured[id(module)] = {"query": query * scaling, "key": key, "value": value, "output": output}
    return output, None


@pytest.mark.parametrize("family", BARE)
def test_projections_give_what_the_models_attention_computes(family):
    model = bare(family)
    anatomy = Anatomy.of(model)
    hidden: dict[int, torch.Tensor] = {}
    to_output: dict[int, torch.Tensor] = {}
    with torch.no_grad(), Patch(model, "test") as patch:
        patch.attention("capture", capturing_attention, eager_mask)
        for layer in anatomy.layers:
            patch.hook(
                layer.attention,
                lambda m, args, kwargs, i=layer.index: hidden.update({i: args[0] if args else kwargs["hidden_states"]}),
                "forward_pre",
                with_kwargs=True,
            )
            patch.hook(
                layer.output.module, lambda m, args, i=layer.index: to_output.update({i: args[0]}), "forward_pre"
            )
        run(model)
    assert len(hidden) == anatomy.num_layers == len(captured) == 3
    for layer in anatomy.layers:
        x, seen = hidden[layer.index], captured[id(layer.attention)]
        for name, heads in (
            ("query", anatomy.num_heads),
            ("key", anatomy.num_kv_heads),
            ("value", anatomy.num_kv_heads),
        ):
            projection = getattr(layer, name)
            for states in (projection(x), linear(x, projection.weight, projection.bias)):
                states = states.view(*x.shape[:2], heads, anatomy.head_dim)
                states = layer.norms[name](states) if name in layer.norms else states
                if name == "query":
                    states = states * layer.attention.scaling
                torch.testing.assert_close(states.transpose(1, 2), seen[name], rtol=1e-4, atol=1e-5)
        joined = seen["output"].flatten(2)
        assert torch.equal(to_output[layer.index].view_as(joined), joined)
        expected = layer.output.module(joined)
        torch.testing.assert_close(linear(joined, layer.output.weight, layer.output.bias), expected)
    captured.clear()


@pytest.mark.parametrize("family", BARE)
def test_the_feed_forward_parts_compute_what_goes_down(family):
    model = bare(family)
    anatomy = Anatomy.of(model)
    config = anatomy.config
    names = [getattr(config, n, None) for n in ("hidden_activation", "hidden_act", "activation_function")]
    act = ACT2FN[next(name for name in names if name)]
    inputs: dict[tuple[str, int], torch.Tensor] = {}
    with torch.no_grad(), Patch(model, "test") as patch:
        for layer in anatomy.layers:
            for name in ("up", "down"):
                module = getattr(layer, name).module
                patch.hook(module, lambda m, args, k=(name, layer.index): inputs.update({k: args[0]}), "forward_pre")
        run(model)
        for layer in anatomy.layers:
            x = inputs["up", layer.index]
            up = linear(x, layer.up.weight, layer.up.bias)
            torch.testing.assert_close(layer.up(x), up)
            inner = act(up) if layer.gate is None else act(layer.gate(x)) * up
            torch.testing.assert_close(inner, inputs["down", layer.index].view_as(inner))
            assert layer.down.weight.shape == (anatomy.hidden_size, inner.shape[-1])
            assert (layer.mlp is None) == (family in ("opt", "bert"))
            if layer.mlp is not None:
                assert layer.up.module in layer.mlp.modules()


@pytest.mark.parametrize("family", BARE)
def test_facts(family):
    model = bare(family)
    anatomy = Anatomy.of(model)
    grouped = FAMILIES[family].get("num_key_value_heads", 4)
    assert anatomy.architecture == family
    assert (anatomy.num_layers, anatomy.num_heads, anatomy.num_kv_heads) == (3, 4, grouped)
    assert anatomy.group_size == 4 // grouped
    assert anatomy.head_dim == FAMILIES[family].get("head_dim", 8)
    assert anatomy.hidden_size == 32
    assert anatomy.vocab_size == (None if family == "vit" else 64)
    assert anatomy.max_positions == (17 if family == "vit" else 128)
    assert anatomy.causal == (family in DECODERS)
    assert anatomy.position == ("learned" if family in ("gpt2", "opt", "bert", "vit") else "rotary")
    assert anatomy.head is None and not anatomy.tied
    assert anatomy.parameter_count() == sum(p.numel() for p in model.parameters())
    assert [layer.index for layer in anatomy.layers] == [0, 1, 2]
    assert len({id(layer.block) for layer in anatomy.layers}) == 3
    for layer in anatomy.layers:
        assert all(isinstance(norm, nn.Module) for norm in layer.norms.values())
        assert layer.query.rows.shape == layer.query.weight.shape[:1]


@pytest.mark.parametrize("family", BARE)
def test_norms_stand_where_their_names_say(family):
    """A norm named after what follows feeds it; one named 'after' is fed by it."""
    model = bare(family)
    layer = Anatomy.of(model).layers[1]
    order: list[str] = []
    with torch.no_grad(), Patch(model, "test") as patch:
        parts = {"attention": layer.attention, "mlp": layer.up.module}
        for name, module in parts.items():
            patch.hook(module, lambda m, args, n=name: order.append(n), "forward_pre")
        for name, module in layer.norms.items():
            patch.hook(module, lambda m, args, n=f"norm {name}": order.append(n), "forward_pre")
        run(model)
    for name in layer.norms:
        if name in parts:
            assert order.index(f"norm {name}") < order.index(name)
        elif name.startswith("after_"):
            assert order.index(f"norm {name}") > order.index(name.removeprefix("after_"))
        else:
            assert order.index("attention") < order.index(f"norm {name}") < order.index("mlp")


def test_norms_of_a_post_norm_opt():
    norms = Anatomy.of(build("opt", do_layer_norm_before=False)).layers[0].norms
    assert set(norms) == {"after_attention", "after_mlp"}


@pytest.mark.parametrize("family", BARE)
def test_the_cache_holds_the_bytes_that_are_said(family):
    if family not in DECODERS:
        assert Anatomy.of(bare(family)).cache_bytes_per_token() == 0
        return
    model = build(family)
    cache = model(token_ids(model, batch=2, length=11), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    anatomy = Anatomy.of(model)
    assert anatomy.cache_bytes_per_token() == held // (2 * 11)
    assert anatomy.cache_bytes_per_token(torch.bfloat16) == anatomy.cache_bytes_per_token("float16") == held // (4 * 11)
    assert Anatomy.of(model.half()).cache_bytes_per_token() == held // (4 * 11)
    with pytest.raises(SpecError, match="'float17'"):
        anatomy.cache_bytes_per_token("float17")


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tie", [True, False])
def test_models_with_a_language_head(family, tie):
    model = build(family, tie_word_embeddings=tie)
    anatomy = Anatomy.of(model)
    assert anatomy.model is model and anatomy.base is not model
    assert anatomy.head is model.get_output_embeddings()
    assert anatomy.embedding is model.get_input_embeddings()
    assert anatomy.tied == tie
    assert anatomy.parameter_count() == sum(p.numel() for p in model.parameters())
    if anatomy.final_norm is not None and family not in ("opt",):
        hidden = anatomy.base(token_ids(model)).last_hidden_state
        logits = model(token_ids(model)).logits
        cap = getattr(model.config, "final_logit_softcapping", None)
        expected = anatomy.head(hidden)
        torch.testing.assert_close(logits, expected if cap is None else cap * torch.tanh(expected / cap))


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_models_with_a_classification_head(family):
    model = build(family, "ForSequenceClassification", num_labels=3)
    anatomy = Anatomy.of(model)
    assert anatomy.architecture == family
    assert anatomy.head.out_features == 3 and not anatomy.tied


def test_other_heads():
    assert Anatomy.of(build("vit", "ForImageClassification", num_labels=5)).head.out_features == 5
    masked = build("bert", "ForMaskedLM")
    assert Anatomy.of(masked).head is masked.cls.predictions.decoder
    assert Anatomy.of(masked).tied
    assert Anatomy.of(build("bert", is_decoder=True)).causal


def test_the_final_norm_is_the_last_to_run():
    for family in BARE:
        model = bare(family)
        anatomy = Anatomy.of(model)
        if family == "bert":
            assert anatomy.final_norm is None
            continue
        seen = []
        with torch.no_grad(), Patch(model, "test") as patch:
            patch.hook(anatomy.final_norm, lambda m, args, out, seen=seen: seen.append(out))
            patch.hook(anatomy.layers[-1].block, lambda m, args, out, seen=seen: seen.append("block"))
            run(model)
        assert seen[0] == "block" and torch.is_tensor(seen[1]), family


def test_sliding_windows():
    windows = {
        "llama": (None, None, None),
        "mistral": (16, 16, 16),
        "gpt2": (None, None, None),
        "gemma2": (16, None, 16),
        "qwen2": (None, None, None),
    }
    for family, expected in windows.items():
        assert Anatomy.of(build(family)).sliding_windows == expected
    assert Anatomy.of(build("mistral", sliding_window=None)).sliding_windows == (None, None, None)
    qwen = build("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert Anatomy.of(qwen).sliding_windows == (None, None, 8)
    gemma = build("gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    assert Anatomy.of(gemma).sliding_windows == (16, None, 16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("name", ["query", "key", "value", "output", "up", "down"])
def test_a_new_weight_can_be_written_through_a_projection(family, name):
    model = bare(family)
    layer = Anatomy.of(model).layers[1]
    projection = getattr(layer, name)
    others = {
        n: getattr(layer, n).weight.clone() for n in ("query", "key", "value", "output", "up", "down") if n != name
    }
    new = torch.randn(projection.weight.shape)
    before = projection.weight.clone()
    with Patch(model, "test") as patch:
        patch.parameter(projection.stored, projection.merged(new))
        assert torch.equal(projection.weight, new)
        x = torch.randn(2, 3, new.shape[1])
        bias = 0 if projection.bias is None else projection.bias
        torch.testing.assert_close(projection(x), x @ new.T + bias, rtol=1e-4, atol=1e-4)
        for other, weight in others.items():
            assert torch.equal(getattr(layer, other).weight, weight), other
    assert torch.equal(projection.weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_peft_model_is_seen_through(family):
    peft = pytest.importorskip("peft")
    model = build(family)
    plain = Anatomy.of(copy.deepcopy(model))
    target = plain.layers[0].query.module
    target = next(n.split(".")[-1] for n, m in plain.model.named_modules() if m is target)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], init_lora_weights=False)).eval()
    anatomy = Anatomy.of(wrapped)
    assert anatomy.model is model and anatomy.base is not model and anatomy.head is not None
    query = anatomy.layers[0].query
    x = torch.randn(2, 3, 32)
    adapted = query(x)
    assert not torch.allclose(adapted, plain.layers[0].query(x))
    with pytest.raises(UnsupportedModelError, match="merge"):
        _ = query.weight
    with wrapped.disable_adapter():
        assert torch.equal(query.weight, plain.layers[0].query.weight)
    wrapped.merge_adapter()
    torch.testing.assert_close(linear(x, query.weight, query.bias), adapted, rtol=1e-4, atol=1e-4)


def test_layers_of():
    anatomy = Anatomy.of(build("llama", num_hidden_layers=8))
    for which, expected in {
        "all": tuple(range(8)),
        "2-5": (2, 3, 4, 5),
        " 0, 3 ,5 - 7": (0, 3, 5, 6, 7),
        "4": (4,),
        "5-6,2,6": (2, 5, 6),
        "7-7": (7,),
    }.items():
        assert anatomy.layers_of(which) == expected
    assert anatomy.layers_of(3) == (3,)
    assert anatomy.layers_of([5, 1, 5]) == (1, 5)
    for wrong in ("", "8", "0-8", "5-2", "-1", "a", "1,,2", "1.5", [], [8], -1, True, None, 2.0, ["1"]):
        with pytest.raises(SpecError, match=r"'layers'.*0 to 7"):
            anatomy.layers_of(wrong)


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*supported: llama.*ARCHITECTURES\['t5'\]"):
        config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
        Anatomy.of(transformers.T5Model(config))
    for no_model in (nn.Linear(2, 2), "llama"):
        with pytest.raises(UnsupportedModelError, match="no transformers model"):
            Anatomy.of(no_model)
    with pytest.raises(UnsupportedModelError, match="LlamaModel and GPT2Model"):
        Anatomy.of(nn.ModuleList([build("llama"), build("gpt2")]))
    broken = build("llama")
    broken.model.layers[1].self_attn.q_proj = nn.Linear(32, 16)
    with pytest.raises(UnsupportedModelError, match=r"layer 1.*\[16, 16, 16\].*\[32, 16, 16\]"):
        Anatomy.of(broken)
    del broken.model.layers[1].self_attn.q_proj
    with pytest.raises(UnsupportedModelError, match=r"no part 'self_attn\.q_proj'"):
        Anatomy.of(broken)


def test_an_architecture_can_be_added(monkeypatch):
    model = transformers.StableLmForCausalLM(
        transformers.StableLmConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )
    with pytest.raises(UnsupportedModelError, match="'stablelm'"):
        Anatomy.of(model)
    monkeypatch.setitem(ARCHITECTURES, "stablelm", replace(ARCHITECTURES["llama"]))
    assert Anatomy.of(model).num_layers == 2


def test_a_quantised_weight_is_refused_but_computed_with():
    class Packed(nn.Linear):
        """As quantising libraries do it: a Linear whose weight is packed into bytes."""

        def __init__(self, plain: nn.Linear) -> None:
            super().__init__(plain.in_features, plain.out_features, bias=False)
            self.weight = nn.Parameter(plain.weight.detach().view(torch.uint8).flatten(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.weight.view(torch.float32).view(self.out_features, self.in_features))

    model = bare("llama")
    attention = model.layers[0].self_attn
    x, plain = torch.randn(1, 2, 32), attention.q_proj
    attention.q_proj = Packed(plain)
    layer = Anatomy.of(model).layers[0]
    assert torch.equal(layer.query(x), plain(x))
    with pytest.raises(UnsupportedModelError, match="unquantised"):
        _ = layer.query.weight
