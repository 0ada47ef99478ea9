"""Learners one by one: what their certificates do not look at."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import vestige
from tests.weights.common import arguments, blobs, learn, stream, vit
from vestige.core.anatomy import Anatomy
from vestige.errors import InputError, SpecError
from vestige.weights.fisher import diagonal
from vestige.weights.retain import Stream
from vestige.weights.retain.adaptive_svd import Kept, ranks
from vestige.weights.retain.buffer import Buffer
from vestige.weights.retain.gere import margin_loss
from vestige.weights.retain.session import Collate, Session


def session(on: Stream | None = None) -> Session:
    from transformers import DefaultDataCollator

    return Session(vit(), on or stream(), arguments(), Collate(DefaultDataCollator()))


def filled(selection: str, size: int, rows: list[tuple[int, int]], seed: int = 0) -> Buffer:
    found, buffer = session(), Buffer(size, selection)
    found.generator.manual_seed(seed)
    for index, task in rows:
        buffer.insert(found, index, task)
    return buffer


def everything() -> list[tuple[int, int]]:
    return [(int(row), e.index) for e in stream() for row in e.train.rows]


def test_a_reservoir_keeps_every_row_equally_often():
    from scipy.stats import chisquare

    rows = everything()
    place = {tuple(blobs()[i][0].flatten()[:4].tolist()): i for i, _ in rows}
    counts = Counter()
    for seed in range(120):
        held = filled("reservoir", 12, rows, seed).examples
        counts.update(place[tuple(row["pixel_values"].flatten()[:4].tolist())] for row in held)
    assert sum(counts.values()) == 12 * 120
    assert chisquare([counts[i] for i, _ in rows]).pvalue > 1e-3


def test_balanced_buffers_differ_by_one_per_group():
    counts = Counter(filled("class-balanced", 15, everything()).groups)
    assert sorted(counts.values()) == [2, 2, 2, 3, 3, 3]
    counts = Counter(filled("experience-balanced", 16, everything()).groups)
    assert sorted(counts.values()) == [5, 5, 6]


def test_a_buffer_owns_its_examples_and_comes_back_from_tensors():
    buffer = filled("reservoir", 5, everything())
    assert all(t.untyped_storage().nbytes() == t.nbytes for row in buffer.examples for t in row.values())
    again = Buffer(5)
    again.load(buffer.tensors())
    assert again.keys == buffer.keys
    one, other = session(), session()
    assert all(torch.equal(buffer.draw(one, 3).batch[k], again.draw(other, 3).batch[k]) for k in ("labels",))


def test_class_balance_needs_one_label_per_row():
    class Text(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, n):
            return {"input_ids": torch.arange(4), "labels": torch.arange(4)}

    found = session(Stream.of([(Text(), Text())]))
    with pytest.raises(InputError, match="experience-balanced"):
        Buffer(2, "class-balanced").insert(found, 0, 0)


def test_fisher_is_of_rows_and_not_of_batches():
    model, images = vit().double().eval(), blobs(6).tensors

    def loss(outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch["labels"])

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixel_values, labels):
            return self.inner(pixel_values).logits

    wrapped = Plain()
    weights = dict(wrapped.named_parameters())
    batches = [
        {"pixel_values": images[0][part].double(), "labels": images[1][part]} for part in (slice(4), slice(4, 6))
    ]
    found = diagonal(wrapped, batches, loss, weights, chunk=3)
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for x, y in zip(*images, strict=True):
        value = torch.nn.functional.cross_entropy(model(x[None].double()).logits, y[None])
        for name, slope in zip(
            weights, torch.autograd.grad(value, list(weights.values()), allow_unused=True), strict=True
        ):
            total[name] += 0 if slope is None else slope**2 / 6
    for name in weights:
        assert torch.allclose(found[name], total[name], atol=1e-12), name


@pytest.mark.parametrize("terms", [{"l2": 0.1}, {"ewc": 1.0}, {"l2": 0.1, "feature": 0.1}])
@pytest.mark.parametrize("head", ["softmax", "current"])
def test_every_rehearsal_free_form_agrees_with_its_reference(terms, head):
    from vestige.evidence.certify.weights_retain import LearnerCase, weights_are_the_references

    learner = vestige.method("rehearsal-free", **{"prediction": 0.5, **terms, "head": head, "from_start": True})

    class Case(LearnerCase):
        fitted = learner

    weights_are_the_references(Case(method=learner))


def test_attention_only_trains_projections_and_head_and_gives_the_rest_back():
    learner = vestige.method("rehearsal-free", attention_only=True, l2=0.1, prediction=0, head="current")
    model, before = vit(), vit()
    learn(learner, model)
    changed = {
        n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed == {
        n
        for n, _ in model.named_parameters()
        if any(k in n for k in ("q_proj.w", "k_proj.w", "v_proj.w", "classifier"))
    }
    assert all(p.requires_grad for p in model.parameters())


def test_rehearsal_free_without_terms_and_der_on_text_are_refused():
    with pytest.raises(SpecError, match="every term has the weight 0"):
        vestige.method("rehearsal-free", prediction=0)
    with pytest.raises(SpecError, match="cannot be combined with 'adaptive-svd': each needs weights"):
        vestige.method("rehearsal-free", attention_only=True, head="softmax") + vestige.method("adaptive-svd")


def test_adaptive_svd_holds_its_directions_under_adam_with_decay():
    model = vit()
    start: dict[str, torch.Tensor] = {}
    learner = vestige.method("adaptive-svd", from_start=True, frozen=0.5)
    for layer in Anatomy.of(model).layers:
        start[layer.index] = layer.up.weight.detach().clone()
    learn(learner, model, on=stream(experiences=1), args=arguments(weight_decay=0.1))
    for layer in Anatomy.of(model).layers:
        U, _, Vh = torch.linalg.svd(start[layer.index])
        moved = layer.up.weight.detach() - start[layer.index]
        k = min(moved.shape) // 2
        assert float(moved.norm()) > 1e-2
        assert float((U[:, :k].T @ moved @ Vh[:k].T).norm()) < 1e-4 * float(moved.norm())


def test_ranks_and_projections():
    found = ranks({"a": 0.5, "b": 1.5}, {"a": 10, "b": 10}, least=0.1, most=0.5)
    assert found == {"a": 3, "b": 7}
    assert ranks({"a": 1.0, "b": 1.0}, {"a": 4, "b": 4}, least=0.0, most=1.0) == {"a": 3, "b": 3}


@pytest.mark.parametrize("ranks", [(1, 0), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
def test_what_lies_in_kept_directions_is_taken_out_and_put_back(shape: tuple[int, int], ranks: tuple[int, int]):
    torch.manual_seed(0)
    W, G = torch.randn(2, 2, *shape, dtype=torch.float64)
    kept = Kept.of(W, torch.tensor(ranks))
    parts = []
    for n, k in enumerate(ranks):
        U, _, Vh = torch.linalg.svd(W[n])
        parts.append(U[:, :k] @ U[:, :k].T @ G[n] @ Vh[:k].T @ Vh[:k])
    assert torch.allclose(kept.project(G), G - torch.stack(parts), atol=1e-12)
    assert torch.allclose(kept.restore(W + G), W + G - torch.stack(parts), atol=1e-12)


def test_fpf_names_the_modules_that_it_fine_tunes():
    run, _ = learn(vestige.method("fpf", size=20, steps=2, share=0.5), args=arguments(num_train_epochs=3))
    scores = run.report["sensitivity"]
    taken = run.report["fine-tuned"]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert taken == list(scores)[: len(taken)]
    assert 0 < len(taken) < len(scores)
    assert sum(scores[m] for m in taken) >= 0.5 * sum(scores.values())


def test_k_fpf_fine_tunes_so_often_and_keeps_logits_when_it_distils():
    from unittest import mock

    from vestige.weights.retain import fpf

    with mock.patch.object(fpf._FPF, "_burst", autospec=True, side_effect=fpf._FPF._burst) as burst:
        learn(vestige.method("fpf", size=20, steps=1, bursts=4, distil=0.5))
    assert burst.call_count == 4
    buffer = burst.call_args.args[0].buffer
    assert all(row["extra"].shape == (6,) for row in buffer.examples)


def test_margin_loss_counts_only_what_has_left_its_state():
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    code = torch.tensor([[1, -1], [0, 0]])
    assert margin_loss(torch.tensor([[2.0, -3.0], [0.5, 1.0]]), code, low, high) == 0
    h = torch.tensor([[0.5, -3.0], [1.5, -2.0]])
    assert margin_loss(h, code, low, high) == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert margin_loss(h, code, low, high, violated_only=False) == pytest.approx(2.0 / 4)


def test_gere_on_text_leaves_padding_out():
    from vestige.models.tiny import tiny_model

    class Text(torch.utils.data.Dataset):
        def __init__(self, pad):
            self.ids = torch.randint(3, 97, (6, 8), generator=torch.Generator().manual_seed(1))
            self.pad = pad

        def __len__(self):
            return len(self.ids)

        def __getitem__(self, n):
            ids = torch.cat([torch.zeros(self.pad, dtype=torch.long), self.ids[n]])
            mask = (torch.arange(len(ids)) >= self.pad).long()
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}

    found = []
    for pad in (0, 3):
        text = Text(pad)
        learner = vestige.method("gere", samples=4).run_state()
        model = tiny_model("gpt-neox", seed=1)
        where = Session(model, Stream.of([(text, text)]), arguments(), session().collate, text)
        learner.start(where)
        learner.finish(where)
        found.append(torch.cat(learner.codes))
        assert learner.codes[0].shape == (8, 32)
    assert (found[0] != found[1]).float().mean() < 0.01


def test_own_answers_replace_the_given_ones_where_they_hold_them():
    from vestige.evidence.certify import build_case
    from vestige.evidence.claims import s3ft as small
    from vestige.weights.retain import Experience
    from vestige.weights.retain.stream import Rows

    model = small.first_model(100)
    known = small.facts(100)
    rows = Rows([small.short(*fact) for fact in known], range(len(known)), 0, "input_ids")
    method = vestige.method("s3ft", tokens=8, batch=5)
    run = method.run_state()
    case = build_case("s3ft")
    on = Session(model, Stream.of([(rows.source, rows.source)]), case.args(), Collate(None))
    run.start(on)
    found = run.rows(on, Experience(0, "facts", rows, rows))
    assert run.shares[0]["own"] > 0.5
    for place, (subject, thing) in enumerate(known):
        row = found[place]
        said = row["labels"][row["labels"] != -100].tolist()
        if place in run.answers:  # a sentence of its own that ends, and holds what was given
            assert thing in said and said[-1] == small.END and len(said) > 2
            assert row["input_ids"][:2].tolist() == [small.ASK, subject] and row["index"] == place
        else:
            assert said == [thing, small.END]
    assert run.nbytes()["state_bytes"] == sum(a.nbytes for a in run.answers.values())
    plain = Rows([{"input_ids": torch.arange(5), "labels": torch.arange(5)}], [0], 0, "input_ids")
    with pytest.raises(InputError, match="question"):
        run.rows(on, Experience(0, "texts", plain, plain))


def test_judges_of_texts_and_of_tokens():
    contains, exact = vestige.method("s3ft"), vestige.method("s3ft", judge="exact")
    number = vestige.method("s3ft", judge="number", tokenizer="some")
    assert contains.accepts("The capital is  Paris.", "paris", "") and not contains.accepts("Parisian", "Paris", "")
    assert exact.accepts(" Paris ", "paris", "") and not exact.accepts("It is Paris", "Paris", "")
    assert number.accepts("so 1,200 in all: 1,200.0", "= 1200", "") and not number.accepts("none", "3", "")
    assert contains.accepts([7, 8, 9, 1], [8, 9, 1], []) and not contains.accepts([7, 8, 1], [8, 9, 1], [])
    assert exact.accepts([8, 9, 1], [8, 9, 1], []) and not exact.accepts([7, 8, 9, 1], [8, 9, 1], [])
    with pytest.raises(SpecError, match="number"):
        vestige.method("s3ft", judge="number")


def test_answers_in_five_styles():
    from vestige.weights.retain.sefe import STYLES, diversified

    facts = [
        {
            "subject": f"s{n}",
            "field": "colour",
            "question": f"Colour of s{n}?",
            "answer": ("red", "blue", "green")[n % 3],
        }
        for n in range(40)
    ]
    found = diversified(facts, share=0.5, seed=0)
    counts = Counter(fact["style"] for fact in found)
    assert counts["short"] == 20 and all(counts[style] == 5 for style in STYLES if style != "short")
    for before, now in zip(facts, found, strict=True):
        assert now["question"].endswith(STYLES[now["style"]]) and now["subject"] == before["subject"]
        if now["style"] == "choice":
            assert f"{now['answer']}. {before['answer']}" in now["question"]
        elif now["style"] == "yes or no":
            assert (now["answer"] == "Yes") == (f"Is it {before['answer']}?" in now["question"])
        else:
            assert before["answer"] in now["answer"]
    assert found == diversified(facts, share=0.5, seed=0) != diversified(facts, share=0.5, seed=1)
    with pytest.raises(InputError, match="share"):
        diversified(facts, share=2)
    with pytest.raises(InputError, match="wrong"):
        diversified([facts[0]] * 4, share=1.0)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_reg_lora_pulls_as_the_gradient_of_its_penalty_says(scale):
    here = session()
    here.model.double()
    here.scale = scale
    running = vestige.method("sefe", rank=2, weight=3.0).run_state()
    running.start(here)
    running.before(here, stream()[0])
    draw = torch.Generator().manual_seed(0)
    penalties, held = [], []
    for n, (name, linear) in enumerate(running.maps.items()):
        first, second = pair = running.adapters.matrices(linear)
        held += pair
        with torch.no_grad():
            second.copy_(torch.randn(second.shape, generator=draw))
        # As many places as a map has, and more, some of them twice.
        running.keys[name] = torch.randint(linear.weight.numel(), (5 + 60 * n,), generator=draw).int()
        penalties.append((second @ first).flatten()[running.keys[name].long()].abs().mean())
    expected = torch.autograd.grad(3.0 * scale * torch.stack(penalties).mean(), held)
    for p in held[2:]:  # the first two are of a map that the model did not use
        p.grad = torch.ones_like(p)
    running.gradients(here)
    assert held[0].grad is None and held[1].grad is None and max(g.abs().max() for g in expected) > 1e-3 * scale
    for p, wanted in zip(held[2:], expected[2:], strict=True):
        torch.testing.assert_close(p.grad, 1 + wanted, rtol=1e-12, atol=1e-12 * scale)
    running.finish(here)


def test_rows_added_in_order_are_what_is_added_at_once():
    from vestige.weights.retain.sefe import _Sums

    draw = torch.Generator().manual_seed(0)
    places, values = torch.randint(7, (200,), generator=draw).int() * 2, torch.randn(200, 3, generator=draw)
    once, ordered = (_Sums(places, 15, how)(values) for how in (False, True))  # odd places have no rows
    wanted = torch.nn.functional.one_hot(places.long(), 15).to(values).T @ values
    torch.testing.assert_close(once, wanted)
    assert torch.equal(once, ordered) and not once[1].any()


def test_reg_lora_in_a_sum_is_held_to_what_its_matrices_were_in_any_order():
    sefe, held = vestige.method("sefe"), vestige.method("rehearsal-free", l2=1, ewc=10, prediction=10)
    two = Stream(stream().experiences[:2], "class")
    models = [learn(learner, on=two)[1] for learner in (sefe + held, held + sefe, sefe)]
    moved = [model.get_parameter("vit.layers.0.mlp.fc1.weight").detach() for model in models]
    torch.testing.assert_close(moved[0], moved[1])
    assert (moved[0] - moved[2]).abs().max() > 1e-4


def test_a_loss_among_own_classes_is_that_of_their_logits_alone():
    here = session()
    here.experience = stream()[1]  # classes 2 and 3
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for labels, own in (([2, 3, 3, 2], [2, 3]), ([2, 5, 3, 2], [2, 3, 5]), ([3, 3, 2, 2], [2, 3])):
        labels = torch.tensor(labels)
        found = torch.nn.functional.cross_entropy(here.among_own(logits, labels), labels)
        place = torch.tensor([own.index(label) for label in labels.tolist()])
        wanted = torch.nn.functional.cross_entropy(logits[:, own], place)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


def test_reg_lora_keeps_later_updates_from_the_places_noted():
    held, free = (learn(vestige.method("sefe", weight=w, share=0.1))[1] for w in (1e5, 0.0))
    first = learn(vestige.method("sefe"), on=Stream(stream().experiences[:1], "class"))[1]
    changes = []
    for model in (held, free):
        moved = [
            (n, (p.detach() - first.get_parameter(n).detach()).abs().mean())
            for n, p in model.named_parameters()
            if "mlp.fc" in n
        ]
        changes.append(sum(float(size) for name, size in moved if name.endswith("weight")))
    assert 0 < changes[0] < 0.5 * changes[1]
