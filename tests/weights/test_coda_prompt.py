"""CODA-Prompt: what its certificate does not look at."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vestige
from tests.weights.common import arguments, blobs, learn, stream, vit
from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.models.tiny import tiny_model
from vestige.weights.retain import ContinualTrainer, Stream
from vestige.weights.retain.coda_prompt import PARTS, assemble, orthogonality, orthonormal, prompted
from vestige.weights.retain.learner import Learner


def coda(**options):
    return vestige.method("coda-prompt", **{"components": 3, "length": 4, **options})


def taught(model, on=None, learner=None, **options):
    """The run, and what it learnt beside the model."""
    trainer = ContinualTrainer(model, learner or coda(), arguments(**options))
    return trainer.run(stream() if on is None else on), trainer.running.learnt()


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(**(inputs or {"pixel_values": blobs(30, seed=1).tensors[0]})).logits


def test_a_prompt_is_the_sum_of_components_by_cosine():
    draw = torch.Generator().manual_seed(0)
    q, P, K, A = (torch.randn(*s, generator=draw) for s in ((2, 5), (3, 4, 6), (3, 5), (3, 5)))
    due = sum(F.cosine_similarity(q * A[m], K[m][None])[:, None, None] * P[m] for m in range(3))
    assert torch.allclose(assemble(q, P, K, A), due, atol=1e-6)
    assert torch.allclose(assemble(7 * q, P, 3 * K, 2 * A), due, atol=1e-6)


def test_new_components_stand_at_right_angles_to_all():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(3, 9, generator=draw, dtype=torch.float64)  # not orthogonal to each other
    new = orthonormal(before, 5, draw)
    assert torch.allclose(new @ new.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(new @ before.T, torch.zeros(5, 3, dtype=torch.float64), atol=1e-12)
    assert orthogonality(new.reshape(5, 3, 3)) < 1e-20
    assert orthogonality(2 * new) == pytest.approx(9 / 5)


def test_only_prompts_and_the_rows_of_the_experience_are_trained():
    model, before = vit(), vit()
    _, first = taught(model, on=Stream(stream().experiences[:1], "class"))
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        if not name.startswith("classifier"):
            assert torch.equal(now, then), name
            continue
        assert torch.equal(now[2:], then[2:]) and not torch.equal(now[:2], then[:2])
    assert all(p.requires_grad for p in model.parameters())
    fresh = {name: values[:3] for name, values in taught(vit(), on=stream(), learning_rate=0.0)[1].items()}
    assert all(not torch.equal(first[name], fresh[name]) for name in first)


def test_components_of_earlier_experiences_are_frozen_under_decay():
    parts = stream().experiences
    found = [taught(vit(), on=Stream(parts[:n], "class"), weight_decay=0.1)[1] for n in (1, 2)]
    for name in (f"{layer}.{part}" for layer in (0, 1) for part in PARTS):
        assert found[1][name].shape[0] == 6
        assert torch.equal(found[0][name], found[1][name][:3]), name


def test_prompts_are_put_on_again_and_taken_off():
    model = vit()
    run, learnt = taught(model)
    bare = logits(model)
    asked = blobs(30, seed=1).tensors[1]
    with prompted(model, learnt):
        found = logits(model)
        assert float((found.argmax(-1) == asked).float().mean()) == pytest.approx(run.average)
        with pytest.raises(vestige.errors.PatchConflictError, match="attention prompts"):
            prompted(model, learnt)
    assert not torch.equal(found, bare) and torch.equal(logits(model), bare)
    assert run.state_bytes == sum(values.nbytes for values in learnt.values()) == 2 * 9 * 4 * (4 * 16 + 16 + 16)
    numbered = {f"0:{name}": values for name, values in learnt.items()} | {"generator": torch.zeros(1)}
    with prompted(model, numbered):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("wrong", [{}, {"0.keys": torch.ones(3, 16)}, {"1.keys": torch.ones(3, 16)}])
def test_what_is_no_prompt_is_refused(wrong):
    with pytest.raises(InputError, match="no prompts"):
        prompted(vit(), wrong)
    with pytest.raises(InputError, match="no prompts"):
        prompted(
            vit(hidden_size=8),
            {f"0.{part}": torch.ones(3, 4, 16)[:, 0 if part != "prompts" else ...] for part in PARTS},
        )


def test_every_attention_implementation_gives_the_same():
    _, learnt = taught(vit())
    found = []
    for kind in ("eager", "sdpa"):
        model = vit(attn_implementation=kind)
        with prompted(model, learnt):
            found.append(logits(model))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_gradients_survive_checkpointing_of_activations():
    models = []
    for checkpointing in (False, True):
        model = vit()
        models.append(taught(model, gradient_checkpointing=checkpointing, max_steps=3)[1])
    assert all(torch.allclose(models[0][name], models[1][name], atol=1e-6) for name in models[0])


def test_padding_of_a_text_encoder_changes_nothing():
    from transformers import BertForSequenceClassification

    config = tiny_model("bert").config
    config.num_labels, config.initializer_range = 3, 0.3
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    draw = torch.Generator().manual_seed(0)
    dim, width = config.hidden_size, config.hidden_size
    shapes = {"prompts": (4, 6, width), "keys": (4, dim), "attention": (4, dim)}
    learnt = {f"0.{part}": torch.randn(*shape, generator=draw) for part, shape in shapes.items()}
    ids = torch.randint(3, 90, (2, 9), generator=draw)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with prompted(model, learnt):
        both = logits(model, input_ids=ids, attention_mask=mask)
        alone = logits(model, input_ids=ids[1:, :5])
    assert torch.allclose(both[1:], alone, atol=1e-5)
    assert not torch.allclose(both, logits(model, input_ids=ids, attention_mask=mask), atol=1e-3)


def test_domains_and_tasks_are_learnt_too():
    domains = Stream.of([(blobs(seed=n), blobs(30, seed=1)) for n in (0, 5)])
    assert taught(vit(), on=domains)[0].matrix.shape == (2, 2)
    assert taught(vit(), on=stream(kind="task"), num_train_epochs=20)[0].average > 0.6


def test_it_is_one_of_a_sum():
    learner = coda() + Learner.from_spec("replay")
    run, learnt = taught(vit(), learner=learner)
    assert set(learnt) == {f"0:{layer}.{part}" for layer in (0, 1) for part in PARTS}
    assert run.replay_bytes > 0
    with pytest.raises(SpecError, match="cannot be combined with 'adaptive-svd': each needs weights"):
        coda() + Learner.from_spec("adaptive-svd")


def test_what_it_cannot_do_is_refused():
    with pytest.raises(SpecError, match="'length' is 5; allowed: even"):
        coda(length=5)
    with pytest.raises(SpecError, match=r"'components' is 6; allowed: at most 5"):
        learn(coda(components=6))
    model = tiny_model("llama")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match="decoder such as llama"):
        learn(coda(), model, on=Stream.of([([{"input_ids": torch.arange(4), "labels": 0}] * 4,) * 2]))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    model = vit()
    model.classifier.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="output layer of the model is not trained"):
        learn(coda(), model)
