"""Control LLM: blocks beside frozen ones, in training, in generation with a cache, saved and undone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vestige
from tests.tiny import DECODERS, build, token_ids
from tests.weights.common import arguments, blobs, learn, stream, vit
from vestige.core.anatomy import Anatomy
from vestige.errors import InputError, PatchConflictError, PatchError, SpecError, UnsupportedModelError
from vestige.weights.retain import ContinualTrainer, Stream
from vestige.weights.retain.control_llm import ControlLLM, Expansion
from vestige.weights.retain.interpolation import INTERPOLATORS, cosine, mse
from vestige.weights.retain.padding import PadTokens

FORMS = {
    "lerp": {},
    "dlerp": {"interpolation": "dlerp"},
    "dlerp-in": {"interpolation": "dlerp-in"},
    "slerp": {"interpolation": "slerp"},
    "stack": {"structure": "stack", "alignment": 0.0},
    "hybrid": {"structure": "hybrid"},
}


def changed(expansion: Expansion, size: float = 0.3) -> Expansion:
    """The same blocks as if they had learnt much."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in expansion.parameters():
            spread = parameter.std(correction=0).clamp(min=0.1)
            parameter.add_(size * torch.randn(parameter.shape, generator=draw) * spread)
    return expansion


@pytest.mark.parametrize(
    ("family", "form"), [*((f, "lerp") for f in DECODERS), *(("llama", form) for form in FORMS if form != "lerp")]
)
def test_copies_change_nothing_until_they_learn_and_nothing_is_left_of_them(family, form):
    model = build(family)
    ids = token_ids(model, batch=2)
    before, names = model(ids).logits, dict(model.named_modules())
    with ControlLLM(every=1, **FORMS[form]).expand(model) as expansion:
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
        assert not torch.allclose(changed(expansion) and model(ids).logits, before, atol=1e-2)
    assert torch.equal(model(ids).logits, before)
    assert dict(model.named_modules()) == names


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_is_generation_without(family):
    model = build(family)
    ids = token_ids(model, batch=2, length=18)  # longer than the sliding windows
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    with changed(ControlLLM(every=1).expand(model)):
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 10], dim=1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
        assert len(cache.layers) == 6
        assert not any(torch.equal(cache.layers[n].keys, cache.layers[3 + n].keys) for n in range(1, 3))


def test_padded_rows_are_as_rows_alone_and_other_caches_hold_the_copies_too():
    model = build("llama")
    ids = token_ids(model, batch=2, length=9)
    ids[0, :4] = 0
    mask = (ids != 0).long()
    mask[0, 4:] = mask[1] = 1
    options = {"max_new_tokens": 5, "do_sample": False}
    with changed(ControlLLM(layers="0,2").expand(model)):
        both = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(both[0, 9:], model.generate(ids[:1, 4:], **options)[0, 5:])
        static = StaticCache(config=model.config, max_cache_len=32)
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=static, **options), both)
        assert len(static.layers) == 5
        plain = DynamicCache()
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=plain, **options), both)
        assert [layer.keys.shape for layer in plain.layers] == [plain.layers[0].keys.shape] * 5


def test_a_cache_that_copies_have_not_seen_is_refused():
    model = build("llama")
    ids = token_ids(model)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with ControlLLM().expand(model), pytest.raises(InputError, match="begin with an empty one"):
        model(ids[:, 10:], past_key_values=cache)


def test_hidden_states_are_the_merged_ones_and_attention_is_the_models():
    model = build("llama", attn_implementation="eager")
    ids = token_ids(model)
    for hooked_before in (False, True):
        model = build("llama", attn_implementation="eager")
        if hooked_before:
            model(ids, output_hidden_states=True)
        with changed(ControlLLM(every=1).expand(model)):
            found = model(ids, output_hidden_states=True, output_attentions=True)
            assert len(found.hidden_states) == 4 and len(found.attentions) == 3
            assert torch.allclose(model.lm_head(found.hidden_states[-1]), found.logits, atol=1e-5)


def test_a_run_leaves_the_model_as_it_was_and_what_was_learnt_is_saved_and_loaded(tmp_path):
    method = ControlLLM(every=1, interpolation="dlerp", freeze_head=False)
    model, before = vit(), vit()
    trainer = ContinualTrainer(model, method, arguments(num_train_epochs=3))
    run = trainer.run(stream())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    expansion = trainer.running.expansion
    images, labels = blobs(30, seed=1).tensors
    last = labels >= 4
    model.eval()
    plain = model(images).logits
    with expansion.attach(model):
        found = model(images).logits
        assert float((found[last].argmax(-1) == labels[last]).float().mean()) == run.matrix[2, 2]
    assert torch.equal(model(images).logits, plain)
    assert run.state_bytes == sum(t.nbytes for t in expansion.tensors().values())
    assert run.report["expanded"] == [0, 1]
    expansion.save(tmp_path / "expanded.safetensors")
    with Expansion.load(tmp_path / "expanded.safetensors").attach(before.eval()) as again:
        assert again.method == method
        assert torch.equal(before(images).logits, found)
        with pytest.raises(PatchError, match="take them off first"):
            again.attach(vit())
    with pytest.raises(InputError, match="does not fit"):
        expansion.attach(vit(intermediate_size=20))
    assert not expansion.besides
    (tmp_path / "none.safetensors").write_bytes(b"none")
    for wrong in ("none.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match="cannot be read"):
            Expansion.load(tmp_path / wrong)


@pytest.mark.slow  # the certificate cuts a run too, and looks at its scores
def test_a_cut_run_learns_the_same(tmp_path):
    from transformers import TrainerCallback

    class Cut(Exception):  # noqa: N818
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if "experience-1" in args.output_dir and state.global_step == 3:
                raise Cut

    method = ControlLLM(every=1, interpolation="prog", learn_share=True, freeze_head=False)

    def trainer(folder, **options):
        return ContinualTrainer(vit(), method, arguments(folder, save_strategy="steps", save_steps=2), **options)

    whole = trainer(tmp_path / "whole")
    whole.run(stream())
    with pytest.raises(Cut):
        trainer(tmp_path / "cut", callbacks=[Kill()]).run(stream())
    again = trainer(tmp_path / "cut")
    again.run(stream(), resume=True)
    due, found = whole.running.learnt(), again.running.learnt()
    assert due.keys() == found.keys()
    assert all(torch.equal(due[name], found[name]) for name in due)


@pytest.mark.slow  # the certificate looks at the form that is the default
@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation": "lerp", "learn_share": True, "share": 0.3, "distance": "cosine"},
        {"interpolation": "dlerp", "balance": "dynamic"},
        {"interpolation": "dlerp-in", "learn_share": True, "freeze_head": True},
        {"interpolation": "prog", "every": 4},
        {"interpolation": "slerp", "learn_share": True, "share": 0.3},
        {"interpolation": "proj"},
        {"structure": "hybrid"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_form_agrees_with_its_reference(changes):
    from vestige.evidence.certify.weights_retain import LearnerCase, weights_are_the_references

    learner = ControlLLM(**{"every": 1, "freeze_head": False, "alignment": 3.0, **changes})

    class Case(LearnerCase):
        fitted = learner

    assert weights_are_the_references(Case(method=learner))["beside the model"] > 10


def test_an_arc_keeps_lengths_and_is_a_line_where_there_is_none():
    slerp = INTERPOLATORS["slerp"](2, 0.25, True, torch.Generator())
    at = torch.tensor([0.0, 0.4, 2.0, 0.0, math.pi], dtype=torch.float64)  # angles of e; f points along the first axis
    e = torch.stack([at.cos(), at.sin()], -1)[None].requires_grad_()
    f = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(e)
    found, share = slerp(f, f, e)
    assert float(share.detach()) == pytest.approx(0.25)
    on_arc = torch.stack([(0.25 * at).cos(), (0.25 * at).sin()], -1)
    assert torch.allclose(found[0, :4], on_arc[:4])
    assert torch.allclose(found[0, 4], torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert bool(torch.autograd.grad(found.sum(), e)[0].isfinite().all())


def test_distances():
    f, e = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mse(f, e), (f - e).square().mean(-1))
    assert torch.allclose(cosine(f, 3 * f), torch.zeros(2, 3), atol=1e-6)
    assert torch.allclose(cosine(f, -f), torch.full((2, 3), 1.5))


def test_padding_is_no_part_of_the_alignment():
    rows = [{"input_ids": torch.arange(3, 3 + n)} for n in (9, 4)]
    model = build("llama")
    with_mask, without = [], []
    for padding in (0, 1):
        batch = PadTokens(padding)(rows)
        learner = ControlLLM(every=1).run_state()
        with changed(learner.expansion.attach(model.train())):
            for mask, found in ((batch, with_mask), ({}, without)):
                learner.objective(None, mask, model(**batch))
                found.append(float(learner.gap.detach()))
    assert with_mask[0] == pytest.approx(with_mask[1], rel=1e-5)
    assert without[0] != pytest.approx(without[1], rel=1e-3)


def test_alignment_holds_the_copies_near_the_frozen_blocks():
    moved = []
    for weight in (0.0, 500.0):
        method = ControlLLM(every=1, alignment=weight, freeze_head=False)
        trainer = ContinualTrainer(vit(), method, arguments(num_train_epochs=8))
        trainer.run(stream(experiences=1))
        model = vit().eval()
        before = model(blobs().tensors[0], output_hidden_states=True).hidden_states[-1]
        with trainer.running.expansion.attach(model):
            after = model(blobs().tensors[0], output_hidden_states=True).hidden_states[-1]
        moved.append(float((after - before).detach().square().mean()))
    assert 0 < moved[1] < 0.2 * moved[0]


def test_gradient_checkpoints_change_nothing():
    class Text(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, n):
            ids = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(n))
            return {"input_ids": ids, "labels": ids}

    found = []
    for checkpoints in (False, True):
        model = build("llama")
        on, args = Stream.of([(Text(), Text())]), arguments(gradient_checkpointing=checkpoints)
        run, _ = learn(ControlLLM(every=1), model, on=on, args=args)
        found.append(run.matrix)
        assert run.matrix[0, 0] > run.untrained[0]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_what_cannot_be_expanded_is_refused():
    with pytest.raises(SpecError, match="0 to 1"):
        learn(ControlLLM(layers="7"))
    with pytest.raises(SpecError, match="'control-llm' cannot be combined with 'sefe'"):
        ControlLLM() + vestige.method("sefe")
    with pytest.raises(SpecError, match="mixes nothing"):
        ControlLLM(structure="stack", learn_share=True)
    with pytest.raises(UnsupportedModelError, match="norms come last"):
        ControlLLM(structure="stack").expand(build("bert", "ForMaskedLM"))
    bare = Anatomy.of(build("llama")).base
    with pytest.raises(UnsupportedModelError, match="no output layer"):
        ControlLLM(freeze_head=False).expand(copy.deepcopy(bare))
    model = build("llama")
    with vestige.method("streaming-llm", budget=16).attach(model), pytest.raises(PatchConflictError, match="kv-cache"):
        ControlLLM().expand(model)
    with ControlLLM().expand(model), pytest.raises(PatchConflictError):
        ControlLLM().expand(model)
