"""One model for all mixers: trained, saved, loaded, generated with; packed, padded, checkpointed, compiled."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from vestige.errors import InputError, SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers import Mixer
from vestige.models import VestigeConfig, VestigeLM, VestigeState
from vestige.models.blocks import RESIDUALS, names_of

MIXERS = names_of(Mixer)
SMALL = {
    "aaren": "aaren(heads=4)",
    "atlas": "atlas(by_block=true)",
    "mamba2": "mamba2(head_dim=8, state=8)",
    "sliding-window": "sliding-window(window=8)",
    "titans-mag": "titans-mag(window=8)",
    "titans-mal": "titans-mal(window=8)",
}
HYBRID = "gated-delta-net gla softmax sliding-window(window=4)"


def build(blocks=HYBRID, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 41, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = VestigeConfig(blocks=blocks, initializer_range=0.15, **{**sizes, **options})
    return VestigeLM(config).eval()


def tokens(batch=2, length=19, seed=1):
    return torch.randint(2, 41, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MIXERS)
def test_train_save_reload_generate(name, tmp_path):
    """Fifty steps on sequences that repeat themselves bring the loss down; what is reloaded goes on the same."""
    model = build(SMALL.get(name, name), num_hidden_layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    phrase = tokens(4, 6)
    losses = []
    for _ in range(50):
        text = phrase.repeat(1, 4)
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if "model" in p.name) == ["model.safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is VestigeLM and again.lm_head.weight is again.model.embed_tokens.weight
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key]), key
    prompt = phrase.repeat(1, 2)
    written = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, again.generate(prompt, max_new_tokens=6, do_sample=False))
    assert float((written[:, 12:] == phrase).float().mean()) > 0.8


def test_registered_with_transformers():
    config = AutoConfig.for_model("vestige", blocks="gla", hidden_size=32)
    assert isinstance(AutoModelForCausalLM.from_config(config), VestigeLM)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("channel", ["swiglu", "mlp", "sglu", None])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "simple-rmsnorm"])
def test_every_rule_norm_and_channel_mixer_trains(residual, channel, norm):
    model = build("gla*2", residual=residual, channel=channel, norm=norm)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@torch.no_grad()
def test_packed_rows_are_as_alone():
    model = build().double()
    text, ends = tokens(1, 21), torch.tensor([0, 8, 9, 21])
    alone = torch.cat([model(text[:, a:b]).logits for a, b in ((0, 8), (8, 9), (9, 21))], 1)
    places = torch.cat([torch.arange(8), torch.arange(1), torch.arange(12)])[None]
    for form in ({"cu_seqlens": ends}, {"cu_seq_lens_q": ends}, {"position_ids": places}):
        read = model(text, **form)
        torch.testing.assert_close(read.logits, alone, atol=1e-10, rtol=0)
        assert read.past_key_values is None
    assert not torch.allclose(model(text).logits, alone)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [HYBRID, "titans-mac(refresh=4)*2"])
def test_several_rows_are_packed_each_in_its_own_way(blocks):
    model = build(blocks).double()
    text, cuts = tokens(2, 21), (((0, 8), (8, 9), (9, 21)), ((0, 5), (5, 21)))
    places = torch.stack([torch.cat([torch.arange(b - a) for a, b in row]) for row in cuts])
    alone = [torch.cat([model(text[n : n + 1, a:b]).logits[0] for a, b in row]) for n, row in enumerate(cuts)]
    torch.testing.assert_close(model(text, position_ids=places).logits, torch.stack(alone), atol=1e-10, rtol=0)


@torch.no_grad()
def test_flash_attention_is_told_of_packed_sequences(monkeypatch):
    """It is given no mask, so boundaries alone keep sequences apart; a loop over them stands for it here."""

    def by_sequence(module, q, k, v, mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **unused):
        assert mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        lengths = cu_seq_lens_q.diff()
        assert lengths.dtype == torch.int32 and max_length_q == max_length_k == lengths.max()
        parts = [t.transpose(0, 1).flatten(1, 2).split(lengths.tolist(), 1) for t in (q, k, v)]
        each = [attend(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in zip(*parts, strict=True)]
        return torch.cat(each, 1).transpose(0, 1).view(q.shape[0], q.shape[2], *q.shape[1::2]), None

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setitem(AttentionInterface._global_mapping, "loop_for_flash", by_sequence)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "loop_for_flash", lambda **unused: None)
    model = build("softmax*2", num_key_value_heads=1).double()
    text = tokens(2, 12)
    told = [{"position_ids": torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])}]
    told += [{"cu_seqlens": torch.tensor([0, 4, 12])}]
    for given in told:
        rows = text[: 1 if "cu_seqlens" in given else 2]
        model.set_attn_implementation("sdpa")
        due = model(rows, **given).logits
        model.config._attn_implementation = "loop_for_flash"  # the setter looks for kernels of that name
        torch.testing.assert_close(model(rows, **given).logits, due)


def test_no_packed_sequence_predicts_the_next_ones_first_token():
    model = build().double()
    text, ends = tokens(1, 21), torch.tensor([0, 8, 21])
    losses = [model(part, labels=part).loss for part in (text[:, :8], text[:, 8:])]
    packed = model(text, labels=text, cu_seqlens=ends).loss
    torch.testing.assert_close(packed, (7 * losses[0] + 12 * losses[1]) / 19)


def test_the_trainer_of_transformers_packs_and_checkpoints(tmp_path):
    """Texts of several lengths, flattened into one row by transformers' own collator, with gradient checkpointing."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    told = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    losses = []
    for checkpointing in (False, True):
        known = "gradient_checkpointing" in TrainingArguments.__dataclass_fields__
        told["gradient_checkpointing" if known else "activation_checkpointing"] = checkpointing
        arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, learning_rate=1e-2, **told)
        texts = [{"input_ids": tokens(1, length)[0].tolist()} for length in (5, 9, 13, 7) * 3]
        model = build().train()
        trainer = Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collator)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1])
    batch = collator([{"input_ids": tokens(1, n)[0].tolist()} for n in (5, 9)])
    with torch.no_grad():
        alone = [model(tokens(1, n), labels=tokens(1, n)).loss * (n - 1) for n in (5, 9)]
        torch.testing.assert_close(model(**batch).loss * (4 + 8), sum(alone))


def test_the_trainer_smooths_labels_of_the_next_token(tmp_path):
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    model = build()
    loss = Trainer(model=model, args=arguments).compute_loss(model, {"input_ids": tokens(), "labels": tokens()})
    logits = model(tokens()).logits[:, :-1].flatten(0, 1)
    due = torch.nn.functional.cross_entropy(logits, tokens()[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, due)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_what_is_held_stands_calls_through_accelerate(name):
    """Where blocks stand on several devices, every module is called with copies of what it is given."""
    model, text = build(SMALL.get(name, name), num_hidden_layers=2), tokens(2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    due = model.generate(text, **options)
    skipped = model._skip_keys_device_placement
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True, skip_keys=skipped)
    assert sum(hasattr(part, "_hf_hook") for part in model.modules()) > 10
    assert torch.equal(model.generate(text, **options), due)


def test_a_layout_follows_blocks_to_their_device():
    """What Accelerate does before each block of a model that is spread over devices."""
    held = torch.ones(2, 5, dtype=torch.bool)
    layout = Layout.of(2, 5, held=held)
    assert send_to_device({"layout": layout}, torch.device("cpu"))["layout"] is layout
    away = send_to_device({"layout": layout}, torch.device("meta"))["layout"]
    parts = (away.positions, away.valid, away.held, away.mask, *away.angles(4, 1e4, torch.float32))
    assert all(part.is_meta for part in parts)
    assert send_to_device({"layout": layout}, torch.device("meta"))["layout"] is away  # moved once, not per block
    assert not layout.positions.is_meta


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(implementation):
    model = build(num_key_value_heads=1).float()
    text, mask = tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    due = model(text, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(implementation)
    seen = model(text, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(seen[mask.bool()], due[mask.bool()], atol=2e-5, rtol=1e-4)


def test_generation_with_padding_beams_and_without_a_cache():
    model = build()
    alone = tokens(1, 7)
    text = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), alone], 1), tokens(1, 12)])
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(text, attention_mask=mask, **options)
    assert torch.equal(written[:1, 12:], model.generate(alone, **options)[:, 7:])
    for beams in (1, 3):
        cached = model.generate(text, attention_mask=mask, num_beams=beams, **options)
        plain = model.generate(text, attention_mask=mask, num_beams=beams, use_cache=False, **options)
        assert torch.equal(cached, plain)
    with pytest.raises(SpecError, match="cache_implementation is 'static'"):
        model.generate(alone, cache_implementation="static", **options)


def test_generation_goes_on_from_a_state():
    model = build()
    text = tokens(1, 12)
    options = {"max_new_tokens": 6, "do_sample": False}
    state = model.new_state()
    with torch.no_grad():
        model(text[:, :8], past_key_values=state)
    assert torch.equal(model.generate(text, past_key_values=state, **options), model.generate(text, **options))


def test_checkpointing_changes_no_gradient():
    model = build().double().train()
    model(tokens(), labels=tokens()).loss.backward()
    due = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    switch = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
    (switch or model.gradient_checkpointing_enable)()
    model(tokens(), labels=tokens()).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, due[name], msg=name)
    with pytest.raises(InputError, match="checkpointing"):
        model(tokens(), past_key_values=model.new_state())


def test_gradients_flow_over_segments():
    """What a later segment loses is felt by an earlier one, unless the state is detached."""
    model = build("gated-delta-net").double()
    first, second = tokens(1, 9), tokens(1, 7, seed=2)
    for detached in (False, True):
        embedded = model.model.embed_tokens(first).detach().requires_grad_()
        state = model.new_state()
        model(inputs_embeds=embedded, past_key_values=state)
        if detached:
            state.detach()
        model(second, labels=second, past_key_values=state).loss.backward()
        assert (embedded.grad is None) == detached


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["gated-delta-net gla softmax", *MIXERS])
def test_compiled_in_one_graph(blocks):
    torch.compiler.reset()
    model = build(SMALL.get(blocks, blocks))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens(), labels=tokens(), use_cache=False).loss
    torch.testing.assert_close(loss, model(tokens(), labels=tokens()).loss)
    loss.backward()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("blocks", ["gated-delta-net gla softmax", *MIXERS])
def test_compiled_in_one_graph_with_a_state(blocks):
    """A compiled pass leaves the state that the same pass leaves otherwise."""
    torch.compiler.reset()
    model = build(SMALL.get(blocks, blocks)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    read, due = compiled(tokens()), model(tokens())
    torch.testing.assert_close(read.logits, due.logits)
    assert read.past_key_values.seen == due.past_key_values.seen == tokens().shape[1]
    assert read.past_key_values.nbytes == due.past_key_values.nbytes
    after = compiled(tokens(2, 1, seed=4), past_key_values=read.past_key_values).logits
    torch.testing.assert_close(after, model(tokens(2, 1, seed=4), past_key_values=due.past_key_values).logits)


def test_hidden_states_and_kept_logits():
    model = build("gla*3")
    read = model(tokens(), output_hidden_states=True, logits_to_keep=2)
    assert len(read.hidden_states) == 4 and read.logits.shape == (2, 2, 41)
    torch.testing.assert_close(read.logits, model(tokens()).logits[:, -2:])
    for part in (model, model.model):
        plain = part(tokens(), return_dict=False, use_cache=False)
        assert isinstance(plain, tuple) and torch.equal(plain[0], part(tokens(), use_cache=False)[0])


@torch.no_grad()
def test_a_state_is_saved_loaded_forked_reset(tmp_path):
    model = build()
    state = model.new_state()
    assert state.nbytes == 0 and state.batch_size == -1
    model(tokens(), past_key_values=state)
    state.save(tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    loaded, fork = VestigeState.load(tmp_path / "state.safetensors", model.config), state.fork()
    assert loaded.nbytes == fork.nbytes == state.nbytes == sum(state.nbytes_by_layer) > 0
    more = tokens(2, 5, seed=3)
    due = model(more, past_key_values=state).logits
    for other in (loaded, fork):
        assert other.seen == 19
        assert torch.equal(model(more, past_key_values=other).logits, due)
    state.reset()
    assert state.seen == 0 and state.nbytes == 0
    assert torch.equal(model(more, past_key_values=state).logits, model(more).logits)


def test_what_does_not_fit_is_refused(tmp_path):
    model, other = build(), build("gla*4")
    state = other.new_state()
    other(tokens(), past_key_values=state)
    state.save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="other blocks or sizes"):
        model(tokens(), past_key_values=state)
    with pytest.raises(InputError, match="other blocks or sizes"):
        VestigeState.load(tmp_path / "other.safetensors", model.config)
    with pytest.raises(InputError, match="no state can be read"):
        VestigeState.load(tmp_path / "absent.safetensors", model.config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="holds no state"):
        VestigeState.load(tmp_path / "model" / "model.safetensors", model.config)
    from transformers import DynamicCache

    refused = [
        ({"past_key_values": DynamicCache()}, "DynamicCache"),
        ({"attention_mask": torch.ones(2, 7)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 19).index_fill(1, torch.tensor([4]), 0)}, "between the tokens of row 0"),
        ({"cu_seqlens": torch.tensor([0, 19])}, "one row"),
        ({"cu_seqlens": [0, 19]}, "cu_seqlens is a list"),
        ({"position_ids": torch.arange(7)[None]}, r"position_ids is \(1, 7\); \(2, 19\) is due"),
        ({"inputs_embeds": torch.zeros(2, 19, 32)}, "either"),
        ({"output_attentions": True}, "no attention weights"),
        ({"labels": tokens(), "logits_to_keep": 1}, "without logits_to_keep"),
    ]
    for options, words in refused:
        with pytest.raises(InputError, match=words):
            model(tokens(), **options)
    with pytest.raises(InputError, match=r"input_ids is \(19,\)"):
        model(tokens()[0])
    with pytest.raises(InputError, match="no tokens"):
        model(tokens()[:, :0])
    with pytest.raises(InputError, match="leave no state"):
        model(tokens(1), cu_seqlens=torch.tensor([0, 9, 19]), past_key_values=model.new_state())
    filled = model.new_state()
    model(tokens(), past_key_values=filled)
    with pytest.raises(InputError, match=r"behind the 19 .*generate is given those again"):
        model.generate(tokens(2, 3), past_key_values=filled, max_new_tokens=1)
    right = torch.ones(2, 20)
    right[1, 17:19] = 0
    with pytest.raises(InputError, match="between the tokens of row 1"):
        model(tokens(2, 1), past_key_values=filled, attention_mask=right)
    with pytest.raises(InputError, match="holds 2 rows"):
        model(tokens(3), past_key_values=filled)
    with pytest.raises(InputError, match="cannot be taken back"):
        filled.crop(-1)
