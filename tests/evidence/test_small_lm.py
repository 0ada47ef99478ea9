"""The small decoder of the studies: what each way of mixing can see, and that nothing else differs."""

from __future__ import annotations

import pytest
import torch

from vestige.errors import SpecError
from vestige.evidence.studies.attention_sinks import BEGIN, TRIGGERS, Echoes
from vestige.evidence.studies.deconstructed_attention import FIXED, NO_MIXING, VARIANTS, DeconstructedAttention
from vestige.evidence.studies.small_lm import Mixing, SmallLM, crops, loss_on, train, weights_of


def model_of(*layers: Mixing, parallel: bool = False) -> SmallLM:
    torch.manual_seed(0)
    return SmallLM(layers, hidden=16, heads=2, length=12, fixed_text=text(5)[0], parallel=parallel)


def text(seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("parallel", [False, True])
def test_no_token_sees_a_later_one(name, parallel):
    model = model_of(VARIANTS[name], Mixing(), parallel=parallel)
    other = text()
    other[:, 8:] = (other[:, 8:] + 1) % 256
    assert torch.allclose(model(text())[:, :8], model(other)[:, :8], atol=1e-6)
    assert not torch.allclose(model(text())[:, 8:], model(other)[:, 8:], atol=1e-3)


def test_without_mixing_a_token_sees_itself_only_and_with_any_it_sees_the_past():
    other = text()
    other[:, 0] = (other[:, 0] + 1) % 256
    for name, mixing in VARIANTS.items():
        model = model_of(mixing)
        same = torch.allclose(model(text())[:, 1:], model(other)[:, 1:], atol=1e-6)
        assert same == (name == NO_MIXING), name


def test_a_fixed_sequence_gives_every_text_the_same_weights():
    for name, mixing in VARIANTS.items():
        seen: list[torch.Tensor] = []
        if name != NO_MIXING:
            model_of(mixing)(text(), seen)
            assert torch.equal(seen[0][0], seen[0][1]) == (name in FIXED), name


def test_what_is_fixed_passes_through_the_layers_beside_the_text():
    """Read the fixed text itself, and attention is what standard attention with the same weights would be."""
    standard, fixed = (model_of(mixing, mixing) for mixing in (Mixing(), Mixing(source="fixed text")))
    same, other = text(5)[:1], text(6)[:1]
    assert torch.allclose(standard(same), fixed(same), atol=1e-5)
    assert not torch.allclose(standard(other), fixed(other), atol=1e-2)


def test_the_other_form_gives_all_queries_the_same_proportions():
    seen: list[torch.Tensor] = []
    model_of(Mixing(form="gated"))(text(), seen)
    early, late = seen[0][:, :, 5, :6], seen[0][:, :, 11, :6]
    assert torch.allclose(early, late / late.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("form", ["softmax", "taylor", "gated", "sigmoid"])
def test_weights_are_causal_and_normalised_but_for_sigmoid(form):
    q, k = (torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    weights = weights_of(q, k, form)
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) == (form != "sigmoid")


def test_all_variants_have_the_same_parameters_and_half_of_a_hybrid_is_standard():
    study = DeconstructedAttention(layers=4)
    models = [SmallLM(layers, 16, 2, 8, fixed_text=text()[0, :8]) for layers in study.runs().values()]
    sizes = {sum(p.numel() for p in model.parameters()) for model in models}
    assert len(sizes) == 1
    for (name, where), layers in study.runs().items():
        changed = sum(mixing != Mixing() for mixing in layers)
        assert len(layers) == 4 and changed == (0 if name == "standard" else 4 if where == "everywhere" else 2)


def test_training_learns_and_the_seed_decides():
    line = torch.arange(40) % 5 + 65
    losses = []
    for seed in (0, 0, 1):
        model = model_of(Mixing())
        train(model, lambda chance: crops(line, 4, 9, chance), steps=60, rate=1e-2, seed=seed)
        losses.append(loss_on(model, crops(line, 6, 9, torch.Generator().manual_seed(9)), batch=4))
    untrained = loss_on(model_of(Mixing()), line[None, :9], batch=1)
    assert losses[0] == losses[1] != losses[2] and losses[0] < 0.3 * untrained


def test_echoes_come_after_triggers_only():
    texts = Echoes().draw(torch.Generator().manual_seed(0), rows=40, length=60)
    assert texts.shape == (40, 61) and (texts[:, 0] == BEGIN).all() and (texts[:, 1:] != BEGIN).all()
    trigger = torch.isin(texts[:, 2:-1], torch.tensor(list(TRIGGERS)))
    echoed = texts[:, 3:] == texts[:, 1:-2]
    assert trigger.any() and echoed[trigger].all() and not echoed[~trigger].float().mean() > 0.3


def test_unknown_mixing_and_odd_layers_are_refused():
    with pytest.raises(SpecError, match="unknown mixing"):
        Mixing(form="sofmax")
    with pytest.raises(SpecError, match="need one"):
        SmallLM([Mixing(source="fixed text")], hidden=16, heads=2, length=12)
    with pytest.raises(SpecError, match="'layers' is 3"):
        DeconstructedAttention(layers=3)
    with pytest.raises(SpecError, match="'heads' is 5"):
        DeconstructedAttention(heads=5)
