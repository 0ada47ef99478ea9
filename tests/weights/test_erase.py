"""Reading examples, what counts in a row, stop rules, masks and precision; the certificates hold the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.weights.common import blobs, vit
from vestige.core.method import Method
from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.evidence.certify.erasing import state
from vestige.models.tiny import tiny_model
from vestige.weights.erase.examples import Examples, Reader
from vestige.weights.erase.gradient_ascent import GradientAscent
from vestige.weights.erase.gs_lora import GSLoRA
from vestige.weights.erase.iau import IAU, gradient_restriction
from vestige.weights.erase.losses import row_accuracy, row_losses
from vestige.weights.erase.npo import NPO
from vestige.weights.erase.random_label_forgetting import RandomLabelForgetting, random_labels
from vestige.weights.erase.retrain import Retrain
from vestige.weights.erase.salun import SalUn, saliency_masks
from vestige.weights.erase.ssd import SSD
from vestige.weights.rows import IGNORED


def split() -> dict[str, TensorDataset]:
    """Class 0 is to be forgotten; further rows of the other classes are held out."""
    (x, y), (hx, hy) = blobs().tensors, blobs(30, seed=1).tensors
    return {
        "forget": TensorDataset(x[y == 0], y[y == 0]),
        "retain": TensorDataset(x[y > 0], y[y > 0]),
        "held_out": TensorDataset(hx[hy > 0], hy[hy > 0]),
    }


def test_tokens_are_padded_and_what_follows_on_padding_does_not_count():
    reader = Reader.of(tiny_model("llama"), None)
    rows = [reader.row({"input_ids": [5, 6, 7]}, ""), reader.row({"input_ids": [8, 9]}, "")]
    batch = reader.batch(rows, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_losses_of_causal_rows_are_of_next_tokens():
    logits = torch.full((1, 3, 4), -20.0)
    logits[0, 0, 2] = logits[0, 1, 3] = 0.0  # says 2, then 3
    labels = torch.tensor([[1, 2, 3]])
    assert row_losses(logits, labels, causal=True).item() < 1e-6
    assert row_accuracy(logits, labels, causal=True).item() == 1
    wrong = torch.tensor([[1, 2, 0]])
    assert row_losses(logits, wrong, causal=True, over="sum").item() == pytest.approx(20, rel=1e-5)
    assert row_losses(logits, wrong, causal=True).item() == pytest.approx(10, rel=1e-5)
    assert row_accuracy(logits, wrong, causal=True).item() == 0.5


def test_a_share_held_out_is_disjoint_and_of_the_seed():
    rows = Examples(blobs(), "retain", Reader.of(vit(), None))
    kept, aside = rows.split(0.1, seed=0)
    assert len(aside) == 5
    assert sorted([*kept.numbers, *aside.numbers]) == list(range(48))
    assert rows.split(0.1, seed=1)[1].numbers != aside.numbers


def test_erasing_without_held_out_rows_holds_some_out():
    sets = split()
    sets.pop("held_out")
    assert GradientAscent(epochs=1).erase(vit(), **sets).history
    with pytest.raises(InputError, match="held out"):
        GradientAscent().erase(vit(), forget=sets["forget"], retain=[sets["retain"][0]])


def test_frozen_weights_stay_and_a_frozen_model_is_refused():
    model = vit()
    frozen = [name for name, p in model.named_parameters() if "classifier" not in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = state(model)
    GradientAscent(learning_rate=1e-2).erase(model, **split())
    changed = [name for name, value in state(model).items() if not torch.equal(value, before[name])]
    assert changed and not set(changed) & set(frozen)
    with pytest.raises(UnsupportedModelError, match="require gradients"):
        SSD().erase(vit().requires_grad_(False), **split())


def test_rows_that_cannot_be_stacked_and_models_without_logits_are_refused_before_any_work():
    sets = split()
    pairs = zip(*sets["retain"].tensors, strict=True)
    rows = [{"pixel_values": image, "label": int(label), "file": "of no use to the model"} for image, label in pairs]
    assert GradientAscent(epochs=1).erase(vit(), forget=sets["forget"], retain=rows).history
    rows[7]["pixel_values"] = rows[7]["pixel_values"][:, :4]
    with pytest.raises(InputError, match=r"row 7 of retain: pixel_values is \(1, 4, 8\).* \(1, 8, 8\)"):
        SSD().erase(vit(), forget=sets["forget"], retain=rows)
    with pytest.raises(UnsupportedModelError, match="ViTModel gives no logits"):
        GradientAscent().erase(vit().vit, **sets)


@pytest.mark.parametrize("eraser", [NPO(epochs=1, tolerance=None, target=None), SSD(), IAU()], ids=lambda e: e.name)
def test_an_adapter_of_peft_learns_to_forget_and_the_model_below_stays(eraser):
    from peft import LoraConfig, get_peft_model

    draw = torch.Generator().manual_seed(0)
    model, rows = (
        copy.deepcopy(tiny_model("llama")),
        [{"input_ids": torch.randint(3, 60, (9,), generator=draw)} for _ in range(8)],
    )
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    before = state(adapted)
    trace = eraser.erase(adapted, forget=rows[:2], retain=rows[2:])
    changed = [name for name, value in state(adapted).items() if not torch.equal(value, before[name])]
    assert changed and all("lora" in name for name in changed)
    trace.undo()
    assert all(torch.equal(value, before[name]) for name, value in state(adapted).items())


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    rows = [{"input_ids": [4, 5]}]
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        SSD().erase(T5ForConditionalGeneration(T5Config(**sizes)), forget=rows, retain=rows)


@pytest.mark.parametrize("eraser", [GradientAscent, NPO, RandomLabelForgetting])
def test_a_target_stops_early(eraser):
    trace = eraser(learning_rate=1e-3, target=1.0, check_every=1).erase(vit(), **split())
    assert trace.stopped == "target"
    assert trace.report["steps"] == 1


def test_over_forgetting_goes_back_to_the_last_good_weights():
    model = vit()
    before = state(model)
    method = GradientAscent(learning_rate=1.0, retain_weight=0.0, clip=None, tolerance=0.0, check_every=1)
    trace = method.erase(model, **split())
    assert trace.stopped == "over-forgetting"
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_small_steps_add_up_in_bfloat16():
    model = vit().bfloat16()
    sets = {name: TensorDataset(d.tensors[0].bfloat16(), d.tensors[1]) for name, d in split().items()}
    head = model.classifier.weight
    before = head.detach().clone()
    rule = {"learning_rate": 1e-5, "check_every": 100, "tolerance": None}
    GradientAscent(epochs=1, **rule).erase(model, **sets).undo()
    assert torch.equal(head, before)
    GradientAscent(epochs=60, **rule).erase(model, **sets)
    assert (head != before).float().mean() > 0.2  # a step is far below half a unit in the last place of most weights


def test_a_mask_holds_its_share_and_no_weight_outside_moves():
    gradient = {"a": torch.tensor([[0.0, 3.0], [1.0, -2.0]]), "b": torch.zeros(4)}
    assert [m.sum().item() for m in saliency_masks(gradient, 0.25).values()] == [2, 0]
    assert [m.sum().item() for m in saliency_masks(gradient, 1.0).values()] == [3, 0]
    assert saliency_masks({"a": torch.ones(10)}, 0.3)["a"].sum() == 3
    model = vit()
    before = state(model)
    trace = SalUn(share=0.1, eraser=NPO(learning_rate=1e-2)).erase(model, **split())
    moved = sum((value != before[name]).sum().item() for name, value in state(model).items())
    assert 0 < moved <= trace.report["may_change"] <= 0.1 * sum(p.numel() for p in model.parameters()) + 1


def test_random_labels_are_of_the_row_and_never_the_true_one():
    labels = torch.tensor([IGNORED, 0, 1, 2, 2, 1, 0])
    drawn = random_labels(labels, 3, True, seed=0, place=4)
    assert drawn[0] == IGNORED and bool((drawn[1:] != labels[1:]).all()) and bool((drawn[1:] < 3).all())
    assert torch.equal(drawn, random_labels(labels, 3, True, seed=0, place=4))
    many = [random_labels(torch.tensor(1), 3, True, 0, place).item() for place in range(200)]
    assert set(many) == {0, 2}
    assert {random_labels(torch.tensor(1), 3, False, 0, place).item() for place in range(200)} == {0, 1, 2}


def test_ssd_leaves_weights_that_no_row_uses():
    model = tiny_model("gpt2")
    rows = [{"input_ids": list(range(start, start + 6))} for start in (3, 10, 20, 30)]
    before = state(model)
    trace = SSD(dampening=0.01).erase(model, forget=rows[:1], retain=rows[1:])
    after = state(model)
    trace.undo()
    place = "transformer.wpe.weight"
    assert torch.equal(after[place][6:], before[place][6:])
    assert trace.report["alpha"] > 0 and trace.report["selected"] > 0
    with pytest.raises(SpecError, match="at most alpha"):
        SSD(alpha=0.5, dampening=1.0)


def test_retrain_asks_for_a_start_of_the_same_shapes():
    with pytest.raises(InputError, match="start"):
        Retrain().erase(vit(), **split())
    with pytest.raises(InputError, match="classifier"):
        Retrain().erase(vit(), **split(), start=lambda: vit(labels=9))
    model = vit()
    with pytest.raises(InputError, match="the model itself"):
        Retrain().erase(model, **split(), start=lambda: model)


def test_an_eraser_inside_another_round_trips():
    method = SalUn(share=0.3, eraser=NPO(beta=0.5))
    assert Method.from_spec(method.to_yaml()) == method


def test_the_penalty_of_gradient_restriction_and_its_gradient():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = gradient_restriction(w.square().sum() / 2, [w], weight=0.1)
    assert loss.item() == pytest.approx(12.5 + 0.5)
    (gradient,) = torch.autograd.grad(loss, [w])
    assert torch.allclose(gradient, w + 0.1 * w / 5)


def test_iau_takes_no_step_that_hurts():
    model = vit()
    before = state(model)
    trace = IAU(step=1e9, rule="sgd", tolerance=0.0).erase(model, **split())
    assert trace.stopped == "over-forgetting"
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_iau_steps_no_farther_than_its_target_asks():
    sizes = {}
    for target in (None, 0.5):
        trace = IAU(step=0.05, tolerance=None, target=target).erase(model := vit(), **split())
        sizes[target] = trace.report["step"]
        rows = split()["forget"]
        right = (model(pixel_values=rows.tensors[0]).logits.argmax(1) == 0).float().mean()
        assert right <= 0.5 and trace.history[0]["forget_accuracy"] == pytest.approx(right.item())
    assert sizes[0.5] < sizes[None] == 0.05


def test_gs_lora_changes_feed_forward_maps_alone_and_leaves_no_adapter():
    model = vit()
    before, modules = state(model), {name: type(part) for name, part in model.named_modules()}
    wanted = [p.requires_grad for p in model.parameters()]
    trace = GSLoRA(rank=2, epochs=3, group="matrix").erase(model, **split())
    changed = [name for name, value in state(model).items() if not torch.equal(value, before[name])]
    assert changed and all("mlp" in name and name.endswith("weight") for name in changed)
    assert {name: type(part) for name, part in model.named_modules()} == modules
    assert [p.requires_grad for p in model.parameters()] == wanted and not hasattr(model, "peft_config")
    assert len(trace.report["groups"]) == 8 and 0 < trace.report["trained"] < trace.report["weights"]


def test_gs_lora_raises_the_loss_no_further_than_its_bound():
    model = vit()
    rows = split()
    method = GSLoRA(epochs=60, bound=1.95, forget_weight=1.0, retain_weight=0.0, sparsity=0.0, tolerance=None)
    trace = method.erase(model, **rows)
    losses = [scores["forget_loss"] for scores in trace.history]
    assert losses[0] < 1.9 and max(losses) < 2.05
    assert all(1.95 < loss < 2.02 for loss in losses[-10:])  # it would go on to infinity without the bound


def test_gs_lora_refuses_a_model_whose_maps_are_frozen():
    model = vit()
    for name, weight in model.named_parameters():
        weight.requires_grad_("mlp" not in name)
    with pytest.raises(UnsupportedModelError, match="mlp"):
        GSLoRA().erase(model, **split())
