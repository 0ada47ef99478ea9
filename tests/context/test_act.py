"""Attention calibration: sinks are found, rows stay whole, and heads are chosen by what they do to answers."""

from __future__ import annotations

import pytest
import torch

from vestige.context.steer.act import ACT
from vestige.context.steer.questions import Question, likelihood, sink_heads
from vestige.core.method import Method
from vestige.errors import InputError, SpecError
from vestige.evidence.certify.caching import feed
from vestige.models.tiny import tiny_model

HEADS = tuple((layer, head) for layer in (0, 1) for head in range(9))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    return tiny_model("llama", torch.float64)


def test_a_planted_sink_gives_what_the_definition_says(model):
    """In a layer's attention with one heavy column, the other weights grow by what the column gave up."""
    from vestige.context.attention import Look
    from vestige.context.cache import KeptCache

    count = 12
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, count, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    query[..., 0], key[..., 0] = 3.0, 0.0
    key[:, :, 5, 0] = 2.0
    policy = ACT(heads=((0, 0),), beta=0.25, threshold=0.6)
    cache = KeptCache(policy, 1)
    cache.begin(1, count, None, query.device)
    layer = cache.layers[0]
    layer.update(key, value)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    plain = (query @ key.mT * 0.5).masked_fill(~causal, float("-inf")).softmax(-1)
    output = policy.respond(layer, Look(query, 0.5, None, None), cache.step, lambda: (plain @ value).transpose(1, 2))
    assert layer.aside["sinks"].tolist() == [[[5]]]
    due = plain.clone()
    due[..., 5] *= 0.25
    others = [n for n in range(count) if n != 5]
    due[..., others] *= ((1 - due[..., 5]) / plain[..., others].sum(-1))[..., None]
    assert (due.sum(-1) - 1).abs().max() < 1e-12
    assert (output.transpose(1, 2) - due @ value).abs().max() < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt-neox", "mistral"])
def test_a_pass_without_a_cache_is_calibrated_too(architecture):
    model, ids = tiny_model(architecture, torch.float64), tokens(2, 30)
    heads = tuple((layer, head) for layer in (0, 1) for head in range(4))
    with torch.no_grad(), ACT(heads=heads, alpha=2.0).attach(model) as kept:
        without = model(ids, use_cache=False)
        assert without.get("past_key_values") is None and kept.cache is None
        with_cache = model(ids, use_cache=True)
        assert kept.nbytes > 0
    assert (without.logits - with_cache.logits).abs().max() < 1e-9
    with torch.no_grad():
        assert (without.logits - model(ids, use_cache=False).logits).abs().max() > 1e-3


def test_sinks_that_the_prompt_showed_hold_while_decoding(model):
    ids = tokens(1, 40)
    with ACT(heads=HEADS, alpha=2.0).attach(model) as kept:
        cache = kept.new_cache()
        feed(model, ids[:, :30], [30], cache)
        before = [layer.aside["sinks"].clone() for layer in cache.layers]
        feed(model, ids[:, 30:], [1] * 10, cache)
        assert all(torch.equal(was, layer.aside["sinks"]) for was, layer in zip(before, cache.layers, strict=True))
        assert all((was != 0).all() for was in before), "the first token was taken for a sink"


def test_a_prompt_in_chunks_has_the_sinks_of_the_whole(model):
    """Rows of unequal length included."""
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with ACT(heads=HEADS, alpha=2.0).attach(model) as kept:
        sinks = []
        for chunks in ([40], [25, 15], [9, 20, 8, 3]):
            cache = kept.new_cache()
            feed(model, ids, chunks, cache, mask)
            found = [layer.aside["sinks"].sort(-1).values for layer in cache.layers[:1]]  # later ones read otherwise
            sinks.append([[set(head[head >= 0].tolist()) for head in row] for row in found[0]])
        assert sinks[0] == sinks[1] == sinks[2] and any(map(any, sinks[0]))


def questions(count: int) -> list[Question]:
    drawn = tokens(count, 24, seed=3).tolist()
    return [
        Question(tuple(row[: 12 + n % 5]), (tuple(row[-2:]), tuple(row[-5:-2]), tuple(row[-6:-5])), n % 3)
        for n, row in enumerate(drawn)
    ]


def test_chosen_heads_each_raise_the_likelihood(model):
    asked, seen = questions(6), []
    fitted = ACT.fit(model, asked, layers="all", batch=4, alpha=2.0, progress=lambda done, of: seen.append((done, of)))
    before = likelihood(model, asked).mean()
    candidates = sink_heads(ACT(alpha=2.0), model, asked, [0, 1])
    assert 0 < len(fitted.heads) < len(candidates) == len(seen)
    for head in candidates:
        with ACT(alpha=2.0, heads=(head,)).attach(model):
            assert (likelihood(model, asked).mean() > before) == (head in fitted.heads)
    assert Method.from_spec(fitted.to_json()) == fitted


def test_likelihood_is_that_of_each_question_alone(model):
    asked = questions(5)
    together = likelihood(model, asked, batch=7)
    for question, found in zip(asked, together, strict=True):
        totals = []
        for answer in question.answers:
            ids = torch.tensor([question.prompt + answer])
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            at = range(len(question.prompt) - 1, ids.shape[1] - 1)
            totals.append(sum(logs[n, ids[0, n + 1]] for n in at))
        assert abs(torch.stack(totals).log_softmax(0)[question.right] - found) < 1e-6


def test_heads_chosen_on_another_model_are_refused(model):
    fitted = ACT.fit(model, questions(2), layers="0", alpha=2.0)
    with pytest.raises(SpecError, match="chosen on llama"):
        fitted.attach(tiny_model("gpt2"))
    with pytest.raises(SpecError, match="9 heads"):
        ACT(heads=((0, 9),)).attach(model)


def test_questions_that_cannot_be_asked_are_refused(model):
    with pytest.raises(InputError, match="no questions"):
        ACT.fit(model, [])
    with pytest.raises(InputError, match="two answers"):
        Question((5,), ((6,),), 0)
    with pytest.raises(InputError, match="number 2"):
        Question((5,), ((6,), (7,)), 2)
    with pytest.raises(SpecError, match="batch"):
        ACT.fit(model, questions(1), batch=0)
