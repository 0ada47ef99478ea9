"""Patch: whatever it does to a model is taken back bit for bit, on any way out."""

from __future__ import annotations

import gc
import signal
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from tests.tiny import DECODERS, build, token_ids
from vestige.core import Patch
from vestige.errors import PatchConflictError, PatchError, UnsupportedModelError


@pytest.fixture
def interruptible() -> Iterator[Any]:
    """The handler that raises KeyboardInterrupt: who starts the tests may have the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def model() -> nn.Module:
    return build("llama")


def state(root: nn.Module) -> dict[str, object]:
    """All of a model that a patch may touch: objects by identity, tensors by their bits."""
    found: dict[str, object] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        hooks = [name for name in vars(module) if "hook" in name]
        found[path] = (
            [(name, id(child)) for name, child in module._modules.items()],
            [(name, id(p)) for name, p in module._parameters.items()],
            [(name, None if b is None else b.clone().tolist()) for name, b in module._buffers.items()],
            {name: (list(v) if hasattr(v, "__len__") else v) for name, v in vars(module).items() if name in hooks},
            sorted(vars(module)),
            module.training,
        )
    for name, p in root.named_parameters():
        found[f"{name} bits"] = p.detach().contiguous().view(torch.uint8).numpy().tobytes()
    found["config"] = dict(vars(root.config))
    found["generation"] = dict(vars(root.generation_config))
    found["attention"] = dict(AttentionInterface._global_mapping)
    found["masks"] = dict(AttentionMaskInterface._global_mapping)
    return found


def my_attention(module, *args, **kwargs):
    """The eager attention of the model at hand, counted."""
    my_attention.calls += 1
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


my_attention.calls = 0


def change_everything(patch: Patch, model: nn.Module) -> None:
    layer = model.model.layers[0]
    patch.attribute(layer, "note", "new")
    patch.attribute(layer.mlp, "act_fn", nn.Tanh())
    patch.attribute(layer.mlp, "forward", lambda x: x)
    patch.attribute(model.model.rotary_emb, "inv_freq", torch.ones_like(model.model.rotary_emb.inv_freq))
    patch.attribute(layer.mlp.up_proj, "bias", nn.Parameter(torch.ones(layer.mlp.up_proj.out_features)))
    patch.module("model.layers.1.mlp", nn.Identity())
    patch.module(model.model.norm, nn.LayerNorm(model.config.hidden_size))
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        patch.hook(layer.self_attn, lambda *args: None, kind)
    patch.parameter(layer.self_attn.q_proj.weight, torch.full_like(layer.self_attn.q_proj.weight, float("nan")))
    patch.parameter(model.lm_head.weight, torch.zeros_like(model.lm_head.weight))
    patch.config(model.config, "use_cache", False)
    patch.generation("max_length", 7)
    patch.attention("test-attention", my_attention, eager_mask)


@pytest.mark.parametrize("leave", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_undone_on_any_exit(model, leave):
    ids = token_ids(model)
    before, logits = state(model), model(ids).logits
    try:
        with Patch(model, "test") as patch:
            change_everything(patch, model)
            assert state(model) != before
            assert not torch.equal(model(ids).logits, logits)
            if leave is not None:
                raise leave
    except BaseException as error:
        assert leave is not None and type(error) is leave
    assert state(model) == before
    assert torch.equal(model(ids).logits, logits)
    assert Patch.active(model) == ()


def test_undo_is_idempotent_and_final(model):
    patch = Patch(model, "test")
    patch.config(model.config, "pad_token_id", 3)
    patch.undo()
    model.config.pad_token_id = 5  # the user's own change after the undo
    patch.undo()
    assert model.config.pad_token_id == 5
    with pytest.raises(PatchError, match="undone"):
        patch.attribute(model, "note", 1)
    with pytest.raises(PatchError, match="undone"), patch:
        pass


def test_nan_payloads_and_signed_zeros_come_back(model):
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = float("nan"), -0.0
    before = state(model)
    with Patch(model, "test") as patch:
        patch.parameter(weight, torch.ones_like(weight, dtype=torch.float64))
        assert weight.dtype == torch.float32 and weight.eq(1).all()
    assert state(model) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_patches_of_one_attribute_are_undone_in_any_order(model, order):
    before = state(model)
    mlps = [nn.Identity() for _ in range(3)]
    patches = []
    for number, mlp in enumerate(mlps):
        patch = Patch(model, f"patch {number}")
        patch.module("model.layers.0.mlp", mlp)
        patch.config(model.config, "pad_token_id", 10 + number)
        patch.attribute(model, "fresh", number)
        patch.hook(model.lm_head, print, "backward")
        patch.attention("test-attention", my_attention, eager_mask)
        patches.append(patch)
    alive = set(range(3))
    for number in order:
        patches[number].undo()
        alive.remove(number)
        if alive:
            assert model.model.layers[0].mlp is mlps[max(alive)]
            assert model.config.pad_token_id == 10 + max(alive)
            assert model.fresh == max(alive)
            assert model.config._attn_implementation == "test-attention"
            assert len(model.lm_head._backward_hooks) == len(alive)
            assert model.lm_head._is_full_backward_hook
    assert state(model) == before


def test_nested_blocks(model):
    before = state(model)
    with Patch(model, "outer") as outer:
        change_everything(outer, model)
        middle = state(model)
        with pytest.raises(KeyboardInterrupt), Patch(model, "inner") as inner:
            change_everything(inner, model)
            raise KeyboardInterrupt
        assert state(model) == middle
    assert state(model) == before


def test_a_parameter_under_a_later_patch_stays_until_that_is_undone(model):
    weight = model.model.embed_tokens.weight
    before = state(model)
    first, second = Patch(model, "first"), Patch(model, "second")
    first.config(model.config, "use_cache", False)
    first.parameter(weight, weight + 1)
    first.parameter(weight, weight + 1)  # twice in one patch is no conflict
    second.parameter(weight, weight * 2)
    middle = state(model)
    with pytest.raises(PatchError, match=r"'first' cannot be undone yet: 'second'"):
        first.undo()
    assert state(model) == middle
    second.undo()
    first.undo()
    assert state(model) == before


def test_a_failed_change_undoes_the_earlier_ones(model):
    before = state(model)
    attempts = {
        "have shape": lambda p: p.parameter(model.lm_head.weight, torch.zeros(2)),
        "no parameter or buffer": lambda p: p.parameter(torch.zeros(2), torch.zeros(2)),
        "cannot replace": lambda p: p.attribute(model.model, "norm", "text"),
        "cannot be set": lambda p: p.attribute(model.config, "num_hidden_layers", "many"),
        "num_hidden_layers": lambda p: p.config(model.config, "num_hiden_layers", 3),
        "has no field": lambda p: p.generation("max_lenth", 3),
        "no part 'model.layers.9.mlp'": lambda p: p.module("model.layers.9.mlp", nn.Identity()),
        "no part ''": lambda p: p.module("", nn.Identity()),
        "stands nowhere": lambda p: p.module(nn.Identity(), nn.Identity()),
        "hook kind is 'sideways'": lambda p: p.hook(model.lm_head, print, "sideways"),
        "is no part of": lambda p: p.hook(nn.Identity(), print),
        "keyword": lambda p: p.hook(model.lm_head, print, "backward", with_kwargs=True),
        "shared by every model": lambda p: p.attribute(type(model), "forward", print),
        "already has": lambda p: p.attention("sdpa", my_attention, eager_mask),
    }
    for text, attempt in attempts.items():
        patch = Patch(model, "test")
        change_everything(patch, model)
        with pytest.raises(PatchError, match=text):
            attempt(patch)
        assert state(model) == before, text
        assert Patch.active(model) == ()


def test_building_keeps_on_success_and_undoes_on_failure(model):
    before = state(model)
    patch = Patch(model, "test")
    with patch.building():
        patch.attribute(model, "note", 1)
    assert model.note == 1
    patch.undo()
    with pytest.raises(ZeroDivisionError), Patch(model, "test").building() as patch:
        patch.attribute(model, "note", 1)
        _ = 1 / 0
    assert state(model) == before


def test_ctrl_c_inside_a_change_leaves_nothing(model, interruptible):
    before = state(model)

    class Interrupting(nn.Module):
        def train(self, mode: bool = True):
            signal.raise_signal(signal.SIGINT)
            return super().train(mode)

    class Sensitive:
        def __init__(self) -> None:
            self._value = 0

        @property
        def value(self) -> int:
            return self._value

        @value.setter
        def value(self, value: int) -> None:
            self._value = value
            signal.raise_signal(signal.SIGINT)

    sensitive = Sensitive()
    for change in (
        lambda patch: patch.module("model.norm", Interrupting()),
        lambda patch: patch.attribute(sensitive, "value", 1),
    ):
        patch = Patch(model, "test")
        patch.attribute(model, "note", 1)
        with pytest.raises(KeyboardInterrupt):
            change(patch)
        assert state(model) == before and sensitive.value == 0
        assert signal.getsignal(signal.SIGINT) is interruptible
        assert Patch.active(model) == ()


def test_claims_refuse_each_other_by_name(model):
    with Patch(model, "first method", claims={"kv-cache"}):
        for part in (model, model.model, nn.Sequential(model)):
            with pytest.raises(PatchConflictError, match=r"'second method'.*'first method'.*kv-cache"):
                Patch(part, "second method", claims=["rotary", "kv-cache"])
        assert [p.owner for p in Patch.active(model)] == ["first method"]
        Patch(model, "third", claims="rotary").undo()
        Patch(build("llama"), "elsewhere", claims={"kv-cache"})
    Patch(model, "second method", claims={"kv-cache"}).undo()


def test_active_is_seen_from_the_parts_and_the_whole(model):
    with Patch(model, "whole") as whole, Patch(model.model, "part") as part:
        assert set(Patch.active(model)) == set(Patch.active(model.model)) == {whole, part}
        assert Patch.active(build("llama")) == ()


def test_hooks_run_with_their_options(model):
    seen = []
    with Patch(model, "test") as patch:
        patch.hook(model.model, lambda m, args, kwargs: seen.append(sorted(kwargs)), "forward_pre", with_kwargs=True)
        patch.hook(model.model, lambda m, args: seen.append("first"), "forward_pre", prepend=True)
        patch.hook(model.lm_head, lambda m, args, out: out * 0)
        patch.hook(model.lm_head, lambda m, grad_in, grad_out: seen.append("backward"), "backward")
        logits = model(token_ids(model)).logits
        assert logits.eq(0).all()
        logits.sum().backward()
    assert seen[0] == "first" and "input_ids" in seen[1] and seen[2] == "backward"


def test_tied_modules_are_replaced_wherever_they_stand():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(2, 2)).eval()
    with Patch(model, "test") as patch:
        patch.module(shared, new := nn.Linear(2, 2))
        assert model[0] is new and model[1][0] is new and not new.training
    assert model[0] is shared and model[1][0] is shared
    with Patch(model, "test") as patch:
        patch.module("1.0", new)
        assert model[0] is shared and model[1][0] is new
    assert list(dict(model.named_children())) == ["0", "1", "2"]


@pytest.mark.parametrize("family", DECODERS)
def test_attention_reaches_every_layer(family):
    model = build(family)
    ids = token_ids(model, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    model.set_attn_implementation("eager")
    before, logits = state(model), model(ids, attention_mask=mask).logits
    with Patch(model, "test") as patch:
        patch.attention("test-attention", my_attention, eager_mask)
        my_attention.calls = 0
        assert torch.equal(model(ids, attention_mask=mask).logits, logits)
        assert my_attention.calls == model.config.get_text_config().num_hidden_layers
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert state(model) == before
    calls = my_attention.calls
    model(ids)
    assert my_attention.calls == calls


def test_attention_of_one_part_leaves_the_others():
    both = nn.ModuleList([build("llama"), build("gpt2")])
    with Patch(both, "test") as patch:
        patch.attention("test-attention", my_attention, eager_mask, part=both[1])
        assert both[0].config._attn_implementation != "test-attention"
        assert both[1].config._attn_implementation == "test-attention"
    assert both[1].config._attn_implementation != "test-attention"


def test_attention_names_are_shared_only_for_the_same_function(model):
    other = build("llama")
    first, second = Patch(model, "first"), Patch(other, "second")
    first.attention("test-attention", my_attention, eager_mask)
    second.attention("test-attention", my_attention, eager_mask)
    third = Patch(gpt2 := build("gpt2"), "third")
    with pytest.raises(PatchConflictError, match=r"'third'.*'first'"):
        third.attention("test-attention", sdpa_attention_forward, eager_mask)
    assert gpt2.config._attn_implementation != "test-attention"
    first.undo()
    assert "test-attention" in AttentionInterface() and "test-attention" in AttentionMaskInterface()
    second.undo()
    assert "test-attention" not in AttentionInterface() and "test-attention" not in AttentionMaskInterface()


def test_attention_refuses_what_does_not_go_through_the_interface():
    with pytest.raises(UnsupportedModelError, match="Linear"):
        Patch(model := nn.Linear(2, 2), "test").attention("test-attention", my_attention, eager_mask)
    assert model is not None and "test-attention" not in AttentionInterface()


def test_a_patch_keeps_no_model_alive():
    model = build("llama")
    patch = Patch(model, "test")
    change_everything(patch, model)
    patch.hook(model, lambda *args, model=model: None)
    patch.attribute(model, "itself", lambda model=model: model)
    gone = weakref.ref(model)
    weight = weakref.ref(model.model.layers[1].self_attn.k_proj)
    del model, patch
    gc.collect()
    assert gone() is None and weight() is None
    assert "test-attention" not in AttentionInterface()


def test_a_patch_outlives_its_model_quietly():
    model = build("llama")
    patch = Patch(model, "test")
    patch.attention("test-attention", my_attention, eager_mask)
    patch.attribute(model, "note", 1)
    del model
    gc.collect()
    with pytest.raises(PatchError, match="no longer exists"):
        _ = patch.model
    patch.undo()
    assert "test-attention" not in AttentionInterface()


def test_other_objects_can_be_patched():
    class Slotted:
        __slots__ = ("value",)

        def __init__(self) -> None:
            self.value = 1

    class Guarded:
        @property
        def value(self):
            return 3

    model, slotted = nn.Linear(2, 2), Slotted()
    with Patch(model, "test") as patch:
        patch.attribute(slotted, "value", 2)
        assert slotted.value == 2
    assert slotted.value == 1
    with pytest.raises(PatchError, match=r"Guarded\.value"):
        Patch(model, "test").attribute(Guarded(), "value", 2)


def test_a_config_field_with_two_names_is_one_field():
    model = build("gpt2")
    first, second = Patch(model, "first"), Patch(model, "second")
    before = dict(vars(model.config))
    first.config(model.config, "hidden_size", 1)
    second.config(model.config, "n_embd", 2)
    first.undo()
    assert model.config.n_embd == model.config.hidden_size == 2
    second.undo()
    assert dict(vars(model.config)) == before


def test_only_modules_are_patched():
    with pytest.raises(PatchError, match="str"):
        Patch("llama", "test")
