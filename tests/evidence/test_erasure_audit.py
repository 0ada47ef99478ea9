"""The audit of an erasure: what each way of looking says of models whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.weights.common import blobs, vit
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.evidence import audit_erasure
from vestige.evidence.certify.erasing import state
from vestige.evidence.erasure import Relearning
from vestige.evidence.erasure.probe import probe
from vestige.evidence.erasure.quantise import four_bit, in_four_bits
from vestige.evidence.erasure.relearn import Relearned
from vestige.evidence.erasure.scores import exposure, row_scores
from vestige.models.tiny import tiny_model
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Examples, Reader

HOW = Relearning(learning_rate=3e-3, steps=6, every=3)


def rows(data: TensorDataset, keep) -> TensorDataset:
    x, y = data.tensors
    return TensorDataset(x[keep(y)], y[keep(y)])


SETS = {
    "forget": rows(blobs(60), lambda y: y == 0),
    "retain": rows(blobs(60), lambda y: y > 0),
    "unseen": rows(blobs(60, seed=1), lambda y: y == 0),
}


def taught(*names: str):
    """A small classifier that learnt some of the sets."""
    model = vit()
    x, y = (torch.cat(parts) for parts in zip(*(SETS[name].tensors for name in names), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return taught("forget", "retain"), taught("retain")


def work_of(model, examples, causal=None) -> tuple[Work, Examples]:
    reader = Reader.of(model, None)
    found = Examples(examples, "rows", reader)
    return Work(model, found, found, found, reader, 4, 0, dict(model.named_parameters())), found


def test_a_model_that_still_knows_is_told_from_one_that_never_saw(models):
    knows, never = models
    before = state(knows)
    audit = audit_erasure(knows, **SETS, reference=never, before=knows, relearning=HOW)
    assert all(torch.equal(value, before[name]) for name, value in state(knows).items())
    assert not Patch.active(knows) and all(p.grad is None for p in knows.parameters())
    assert audit.subjects == ("erased", "retrained", "before")
    assert audit["forget accuracy"].value("erased") > 0.9 > 0.2 > audit["forget accuracy"].value("retrained")
    assert audit["retain accuracy"].value("retrained") > 0.9
    assert audit["forget accuracy, 4 bits"].value("erased") > 0.5
    assert audit["steps to relearn"].value("erased") == 0
    assert audit.curves["retrained"].taught[0] < audit.curves["retrained"].taught[-1]
    assert audit["probe"].value("erased") > 0.9
    for measure in audit.measures:  # the erased model is the untouched one
        assert measure.value("erased") == measure.value("before")


def test_the_result_is_a_table_a_figure_and_a_page(models, tmp_path):
    audit = audit_erasure(models[0], **SETS, reference=models[1], relearning=HOW, rows=6)
    table = audit.table()
    assert list(table.columns) == ["erased", "retrained"]
    assert table.loc["forget accuracy", "erased"] == audit["forget accuracy"].value("erased")
    assert json.loads(json.dumps(audit.to_dict()))["sizes"] == {"forget": 10, "retain": 50, "unseen": 10}
    assert audit["retain accuracy"].values["erased"].count == 6
    figure = audit.figure()
    assert {trace.name for trace in figure.data if trace.orientation == "h"} == {"erased", "retrained"}
    assert sum(trace.mode == "lines" for trace in figure.data) == 4
    page = audit.report(tmp_path / "page.html").read_text()
    assert all(measure.name in page for measure in audit.measures)
    assert "steps to relearn" in str(audit)


def test_without_unseen_rows_the_note_says_what_is_missing(models):
    audit = audit_erasure(models[0], SETS["forget"], SETS["retain"], relearning=HOW)
    assert any("membership" in note for note in audit.notes)
    with pytest.raises(KeyError, match="forget accuracy"):
        audit["membership by loss"]


def test_wrong_sets_are_refused(models):
    with pytest.raises(InputError, match="overlap"):
        audit_erasure(models[0], SETS["forget"], SETS["forget"])
    with pytest.raises(InputError, match="unseen overlap"):
        audit_erasure(models[0], SETS["forget"], SETS["retain"], unseen=SETS["forget"])
    with pytest.raises(InputError, match="no rows"):
        audit_erasure(models[0], [], SETS["retain"])
    with pytest.raises(InputError, match="retrained"):
        audit_erasure(models[0], SETS["forget"], SETS["retain"], reference="model")
    with pytest.raises(InputError, match="the erased model is a NoneType"):
        audit_erasure(None, SETS["forget"], SETS["retain"])
    with pytest.raises(InputError, match=r"before model takes input_ids and answers with tokens; allowed: .* pixel"):
        audit_erasure(models[0], SETS["forget"], SETS["retain"], before=tiny_model("llama"))
    with pytest.raises(SpecError, match="rows"):
        audit_erasure(models[0], SETS["forget"], SETS["retain"], rows=0)
    with pytest.raises(SpecError, match="goal"):
        Relearning(goal=1.5)


def test_recital_is_what_greedy_decoding_recites():
    model = tiny_model("llama")
    prompts = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(3))
    said = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for change in range(9):  # the row departs from what the model says after so many tokens
        text = said[0].clone()
        if change < 8:
            text[5 + change] = (text[5 + change] + 1) % 97
        labels = text.clone()
        labels[:5] = -100
        found = row_scores(*work_of(model, [{"input_ids": text, "labels": labels}]))
        assert found.recited[0] == pytest.approx(change / 8)
        assert found.right[0] >= found.recited[0]


def test_losses_of_rows_and_of_their_least_expected_tokens():
    model = tiny_model("llama")
    texts = [torch.arange(3, 14), torch.arange(20, 26)]  # padded together
    found = row_scores(*work_of(model, [{"input_ids": text} for text in texts]))
    for n, text in enumerate(texts):
        log_p = model(text[None]).logits[0, :-1].log_softmax(-1)
        each = -log_p[torch.arange(len(text) - 1), text[1:]].detach()
        most = each.sort(descending=True).values[: -(-len(each) // 5)]
        assert found.loss[n] == pytest.approx(each.mean().item(), rel=1e-4)
        assert found.rare[n] == pytest.approx(most.mean().item(), rel=1e-4)


def test_exposure_is_the_share_of_pairs_in_the_right_order():
    members, others = np.array([0.1, 0.5]), np.array([0.3, 0.5, 0.9])
    found = exposure(members, others)
    assert found.value == pytest.approx((3 + 1.5) / 6)
    assert found.low <= found.value <= found.high
    assert exposure(np.zeros(3), np.ones(3)).value == 1
    assert exposure(np.ones(3), np.ones(3)).value == 0.5


def test_four_bits_have_fifteen_values_and_the_least_error():
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    rounded = four_bit(weight)
    first, last = rounded[:, :64], rounded[:, 64:]
    assert all(len(row.unique()) <= 15 for part in (first, last) for row in part)
    scale = torch.cat([w.abs().amax(1, keepdim=True).expand_as(w) / 7 for w in (weight[:, :64], weight[:, 64:])], 1)
    assert ((rounded - weight).abs() <= scale / 2 + 1e-6).all()
    assert torch.equal(four_bit(torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_model_has_its_weights_back_after_four_bits(architecture):
    model = tiny_model(architecture)
    before = state(model)
    with in_four_bits(model) as count:
        changed = [name for name, value in state(model).items() if not torch.equal(value, before[name])]
        assert count and changed and all("mlp" in name or "attn" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_probe_reads_what_is_there_and_says_why_it_cannot(models):
    work, forget = work_of(models[1], SETS["forget"])
    read = probe(work, forget, Examples(SETS["retain"], "retain", work.reader))
    assert read.layers[-1] == 2 and max(read.forget) > 0.9 and read.labels == 6
    shuffled = TensorDataset(SETS["retain"].tensors[0], torch.randint(0, 6, (50,)))
    assert np.mean(probe(work, forget, Examples(shuffled, "retain", work.reader)).retain) < 0.5
    assert "two labels" in probe(work, forget, forget)


def test_the_first_step_that_reaches_a_goal():
    curve = Relearned((0, 2, 4), (0.1, 0.8, 0.9), (0.0, 0.1, 0.2))
    assert curve.reached(0.8) == 2 and curve.reached(0.95) is None


def test_a_language_model_is_asked_in_other_words_too():
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(0)
    sets = [
        [{"input_ids": torch.randint(3, 90, (n,), generator=draw)} for n in (9, 7, 8, 9, 6, 7)[:count]]
        for count in (4, 6, 4, 4)
    ]
    names = ("forget", "retain", "unseen", "paraphrases")
    audit = audit_erasure(model, **dict(zip(names, sets, strict=True)), relearning=HOW)
    known = [measure.name for measure in audit.measures]
    assert {"forget verbatim", "paraphrases verbatim", "membership by rare tokens", "paraphrases accuracy"} <= set(
        known
    )
    assert audit.sizes["paraphrases"] == 4 and audit.causal
    assert audit.row({"name": "npo"}, "tiny")["metrics"]["forget accuracy"] == audit.metrics()["forget accuracy"]
