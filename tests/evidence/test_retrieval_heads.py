"""Probes of attention heads, against eager attention weights and the written-out score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import vestige
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.evidence.probes.head_mask import mask_heads
from vestige.evidence.probes.retrieval_heads import (
    HeadScores,
    Probed,
    RetrievalHeads,
    _answer,
    copied_share,
    recalled,
)
from vestige.evidence.probes.sink_share import sink_share
from vestige.evidence.references.retrieval_heads import retrieval_score
from vestige.evidence.tasks.needle import Needle


def eager_attentions(model, **inputs):
    """Attention weights of every layer, ``(layers, batch, heads, queries, keys)``."""
    with Patch(model, "test") as patch, torch.inference_mode():
        patch.config(model.config, "_attn_implementation", "eager")
        return torch.stack(model(**inputs, output_attentions=True).attentions)


def test_a_head_copies_what_it_looks_at_while_it_is_said():
    context, span = [9, 9, 5, 6, 7, 9, 5], (2, 5)
    # Head 0 looks at the token that is being said; head 1 at the right place one step late; head 2 at the same
    # token outside the answer; head 3 twice at the same place.
    attended = np.array([[[2, 4, 6, 2]], [[3, 2, 3, 2]], [[4, 3, 4, 4]]])
    shares = copied_share(attended, [5, 6, 7], context, span)
    assert shares.tolist() == [[1.0, 0.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]]
    assert copied_share(attended[:0], [], context, span).tolist() == [[0, 0, 0, 0]]


def test_the_share_is_the_reference_score_of_the_attention_weights():
    chance = np.random.default_rng(1)
    steps, layers, heads, length = 6, 2, 3, 12
    context, span = chance.integers(0, 2, length).tolist(), (4, 9)
    said = chance.integers(0, 2, steps).tolist()
    weights = chance.dirichlet(np.ones(length) / 3, size=(steps, layers, heads))
    weights[..., 4:9] *= 4
    shares = copied_share(weights.argmax(axis=-1), said, context, span)
    for layer in range(layers):
        for head in range(heads):
            expected = retrieval_score(list(weights[:, layer, head]), said, context, range(*span))
            assert shares[layer, head] == pytest.approx(expected)
    assert shares.max() > 0.3


def test_recall_counts_each_token_as_often_as_it_is_wanted():
    assert recalled([1, 1, 2], [1, 2, 2, 3]) == 0.5
    assert recalled([3, 2, 1], [1, 2, 3]) == 1.0
    assert recalled([], [1]) == 0.0


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_where_heads_look_is_where_their_largest_weights_are(kind, toy, tiny):
    """In a left-padded batch, under grouped queries and sliding windows, at every step of decoding."""
    from vestige.context.evict.full import Full

    model, tokenizer = toy
    if kind == "mistral":
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(1)
        sizes = {k: getattr(model.config, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
        config = MistralConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=50
        )
        config.initializer_range = 0.3
        model = MistralForCausalLM(config).eval()
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    prompts = [Needle(length=length, seed=length).build(tokenizer) for length in (260, 301)]
    assert len({len(prompt.input_ids) for prompt in prompts}) == 2
    with Full().attach(model) as kept:
        said, attended = _answer(model, tokenizer, prompts, kept)
    for row, prompt in enumerate(prompts):
        for step in range(len(said[row])):
            ids = torch.tensor([prompt.input_ids + said[row][:step]])
            weights = eager_attentions(model, input_ids=ids)[:, 0, :, -1]
            assert attended[step, :, row].tolist() == weights.argmax(dim=-1).tolist()
    assert all(said)


def test_measuring_leaves_the_model_as_it_was_and_gives_a_table(toy):
    model, tokenizer = toy
    ids = torch.tensor([Needle(length=260).build(tokenizer).input_ids])
    before = model(ids).logits
    probe = RetrievalHeads(lengths=(260,), depths=(0.2, 0.8), answers=("number",), batch=3)
    result = probe.measure(model, tokenizer)
    assert torch.equal(model(ids).logits, before) and not Patch.active(model)
    assert [p.needle for p in result.prompts] == probe.needles() and len(result.prompts) == 2
    table = result.table()
    assert list(table.columns) == ["layer", "head", "score", "retrieval_head"] and len(table) == 2 * 4


def test_only_answered_prompts_count_and_heads_are_ranked():
    needle = Needle()
    good, bad = np.array([[0.2, 0.9], [0.0, 0.05]]), np.ones((2, 2))
    result = HeadScores((Probed(needle, (1,), 1.0, good), Probed(needle, (2,), 0.5, bad)), threshold=0.1)
    assert result.scores.tolist() == good.tolist()
    assert result.heads() == [(0, 1), (0, 0)]
    assert result.ranking() == [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert HeadScores((Probed(needle, (2,), 0.0, bad),), threshold=0.1).heads() == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "opt"])
def test_a_silenced_head_is_one_whose_output_weights_are_zero(architecture, tiny, prompt):
    model = tiny(architecture)
    before = model(prompt).logits
    with mask_heads(model, [(1, 2), (1, 0)]):
        silenced = model(prompt).logits
    assert torch.equal(model(prompt).logits, before) and not Patch.active(model)
    from vestige.core.anatomy import Anatomy

    anatomy = Anatomy.of(model)
    projection = anatomy.layers[1].output.module
    zeroed = projection.weight.detach().clone()
    wide = anatomy.head_dim
    for head in (0, 2):
        inputs = slice(head * wide, (head + 1) * wide)
        zeroed[(inputs, slice(None)) if architecture == "gpt2" else (slice(None), inputs)] = 0
    with Patch(model, "test") as patch:
        patch.parameter(projection.weight, zeroed)
        expected = model(prompt).logits
    torch.testing.assert_close(silenced, expected)
    assert not torch.allclose(silenced, before)


def test_the_causal_check_tries_top_and_random_heads(toy):
    model, tokenizer = toy
    chance = np.random.default_rng(0)
    scores = HeadScores((Probed(Needle(), (1,), 1.0, chance.random((2, 4))),), threshold=0.1)
    frame = RetrievalHeads().causal_check(
        model, tokenizer, scores, heads=(1, 2), draws=2, needles=[Needle(length=250), Needle(length=251)]
    )
    assert frame[["silenced", "kind", "draw"]].values.tolist() == [
        [0, "none", 0],
        [1, "top", 0],
        [1, "random", 0],
        [1, "random", 1],
        [2, "top", 0],
        [2, "random", 0],
        [2, "random", 1],
    ]
    assert (frame["prompts"] == 2).all() and not Patch.active(model)
    with pytest.raises(InputError, match="5"):
        RetrievalHeads().causal_check(model, tokenizer, scores, heads=(5,))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("first", [1, 3])
def test_the_sink_share_is_that_of_the_attention_weights(architecture, first, tiny, prompt):
    model = tiny(architecture)
    ids = torch.cat([prompt, prompt.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = sink_share(model, ids, mask, first=first)
    assert found.shape == (2, model.config.num_hidden_layers, model.config.num_attention_heads)
    for row, start in ((0, 0), (1, 7)):
        weights = eager_attentions(model, input_ids=ids[row : row + 1, start:])[:, 0]
        expected = weights[:, :, first:, :first].sum(dim=-1).mean(dim=-1)
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)
    assert 0 < found.mean() < 1


def test_sink_share_refuses_what_it_cannot_measure(llama, prompt):
    with pytest.raises(InputError, match="first"):
        sink_share(llama, prompt, first=40)
    with pytest.raises(InputError, match="left"):
        sink_share(llama, prompt, torch.tensor([[1] * 30 + [0] * 10]))
    with pytest.raises(InputError, match="shape"):
        sink_share(llama, prompt, torch.ones(1, 3))


def test_wrong_heads_and_parameters_are_named(llama):
    with pytest.raises(InputError, match="head 9 in layer 0"):
        mask_heads(llama, [(0, 9)])
    with pytest.raises(SpecError, match="depth"):
        RetrievalHeads(depths=(1.5,))
    with pytest.raises(SpecError, match="lengths"):
        RetrievalHeads(lengths=())
    with pytest.raises(SpecError, match="haystack"):
        RetrievalHeads(haystack="novels")
    with pytest.raises(SpecError, match="threshold"):
        RetrievalHeads(threshold=0.0)
    assert isinstance(vestige.method("retrieval-heads"), RetrievalHeads)
