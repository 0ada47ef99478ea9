"""Runs from a file: what they leave in their folders, what they take up again, what they refuse."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml

from vestige.cli import main
from vestige.errors import InputError, ModelError, SpecError
from vestige.evidence.data import facts
from vestige.evidence.runs.erase import run_erasure
from vestige.evidence.runs.retain import run_retention
from vestige.evidence.runs.sources import chosen, encoded, examples
from vestige.evidence.runs.spec import Data, Erasing, read_spec
from vestige.models.tiny import tiny_tokenizer

SMALL_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def erasing(out, **changes):
    plain = {
        "out": str(out),
        "data": {"name": "digits", "limit": 80},
        "forget": {"label": 3},
        "model": {"new": SMALL_VIT},
        "learn": {"epochs": 1, "learning_rate": 5e-3},
        "reference": "retrain",
        "eraser": {"name": "gradient-ascent", "epochs": 1},
        "relearning": {"steps": 1, "every": 1},
        "rows": 20,
    }
    return {**plain, **changes}


@pytest.fixture
def capitals(tmp_path):
    path = tmp_path / "facts.jsonl"
    lines = [
        {"question": f"q{n}?", "paraphrase": f"p{n}?", "answer": f"a{n}", "topic": "even" if n % 2 == 0 else "odd"}
        for n in range(8)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_an_erasure_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "specs" / "spec.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(erasing("../out")))
    assert main(["erase", str(path)]) == 0
    printed, said = capsys.readouterr()
    assert "forget accuracy" in printed and "retrained" in printed
    assert f"{tmp_path / 'out' / 'report.html'}" in printed
    assert "pass 1 of 1" in printed + said and "taught before" not in printed + said
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "audit.json", "before", "erased", "erasure.yaml", "ledger.jsonl", "report.html", "retrained"
    }  # fmt: skip
    assert json.loads((out / "ledger.jsonl").read_text())["method"]["name"] == "gradient-ascent"
    taught = (out / "before" / "model.safetensors").stat().st_mtime_ns
    # Another eraser on the same models, which are taken up.
    assert main(["erase", str(path), "--eraser", "ssd", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["subjects"] == ["erased", "retrained", "before"]
    assert (out / "before" / "model.safetensors").stat().st_mtime_ns == taught
    path.write_text(yaml.safe_dump(erasing("../out", learn={"epochs": 3})))
    assert main(["erase", str(path), "--quiet"]) == 2
    assert "another 'learn'" in capsys.readouterr().err


def test_questions_are_erased_in_one_wording_and_asked_in_another(tmp_path, capitals):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    spec = erasing(
        tmp_path / "out",
        data={"name": "jsonl", "file": str(capitals)},
        forget={"topic": "even"},
        model={"new": sizes},
        reference=None,
    )
    done = run_erasure(spec)
    known = {measure.name for measure in done.audit.measures}
    assert {"paraphrases accuracy", "forget verbatim"} <= known
    assert done.audit.sizes["forget"] == done.audit.sizes["paraphrases"]
    before = done.model.state_dict()["model.embed_tokens.weight"].clone()
    done.trace.undo()
    assert not torch.equal(before, done.model.state_dict()["model.embed_tokens.weight"])


def test_learners_on_a_stream_go_on_where_they_were(tmp_path, capsys):
    spec = {
        "out": "out",
        "data": {"name": "digits", "limit": 60},
        "experiences": [[0, 1], [2, 3]],
        "model": {"new": SMALL_VIT},
        "learners": ["finetune", {"name": "replay", "size": 10}],
        "train": {"num_train_epochs": 2, "use_cpu": True},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    said, listener = [], logging.Handler(logging.WARNING)
    listener.emit = said.append
    logging.getLogger("transformers").addHandler(listener)
    assert main(["retain", str(path), "--quiet"]) == 0
    logging.getLogger("transformers").removeHandler(listener)
    assert "replay" in capsys.readouterr().out
    assert not said, "transformers warns of checkpoints that are written within a second"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "finetune" in page and "matrix-1" in page
    again = run_retention(read_spec_of(spec, tmp_path))
    assert len((tmp_path / "out" / "ledger.jsonl").read_text().splitlines()) == 2  # what is known is not told twice
    assert set(again.runs) == {"finetune", "replay"} and again.runs["replay"].matrix.shape == (2, 2)
    assert list(again.table().index) == ["finetune", "replay"]
    held = (tmp_path / "out" / "retention.yaml").read_text()
    for changes in ({"data": {"name": "digits", "limit": 50}}, {"blur": 0.1}, {"seed": 1}):
        with pytest.raises(SpecError, match=f"another '{next(iter(changes))}'"):
            run_retention({**read_spec_of(spec, tmp_path), **changes})
    with pytest.raises(SpecError, match="another training"):
        run_retention({**read_spec_of(spec, tmp_path), "train": {"num_train_epochs": 3, "use_cpu": True}})
    assert (tmp_path / "out" / "retention.yaml").read_text() == held
    more = run_retention({**read_spec_of(spec, tmp_path), "learners": [*spec["learners"], "s3ft"]})
    assert np.array_equal(more.runs["replay"].matrix, again.runs["replay"].matrix)
    assert "s3ft" in (tmp_path / "out" / "retention.yaml").read_text()
    with pytest.raises(SpecError, match="experiences"):
        run_retention({**spec, "out": str(tmp_path / "other"), "experiences": "topic"})
    with pytest.raises(SpecError, match="blur"):
        run_retention({**spec, "out": str(tmp_path / "other"), "blur": 1.5})
    with pytest.raises(SpecError, match="train"):
        run_retention({**spec, "out": str(tmp_path / "other"), "train": {"epochs": 3}})


def test_what_is_learnt_beside_the_weights_is_kept(tmp_path):
    from vestige.evidence.runs.models import build
    from vestige.evidence.runs.spec import Model
    from vestige.weights.retain.control_llm import Expansion

    spec = {
        "out": str(tmp_path / "out"),
        "data": {"name": "digits", "limit": 40},
        "experiences": [[0, 1], [2, 3]],
        "model": {"new": SMALL_VIT},
        "learners": ["control-llm"],
        "train": {"max_steps": 1, "use_cpu": True},
    }
    run_retention(spec)
    expansion = Expansion.load(tmp_path / "out" / "control-llm" / "learnt.safetensors")
    model = build(Model(new=SMALL_VIT), examples(Data(name="digits", limit=40)), None)
    with expansion.attach(model):
        assert [part.index for part in expansion.besides] == [0]


def read_spec_of(spec, folder):
    return {**spec, "out": str(folder / "out")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eraser": {"name": "a2sf"}}, "eraser.*allowed: gradient-ascent, .*ssd"),
        ({"eraser": "retrain"}, "allowed: gradient-ascent, .*ssd"),
        ({"eraser": "sdd"}, "did you mean ssd"),
        ({"forget": {"lable": 3}}, "did you mean"),
        ({"forget": {"random": 0}}, "forget.random"),
        ({"model": {"new": {"hiden_size": 3}}}, "hidden_size"),
        ({"model": {}}, "load"),
        ({"data": {"name": "digit"}}, "data.name"),
        ({"data": {"name": "npz"}}, "file"),
        ({"learn": None}, "learn"),
        ({"learn": {"epoch": 3}}, "epochs"),
        ({"relearning": {"step": 3}}, "relearning"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_description_is_refused_by_name(tmp_path, changes, says):
    with pytest.raises(SpecError, match=says):
        run_erasure(erasing(tmp_path / "out", **changes))


def test_a_reference_that_is_not_there_is_told_before_anything_is_taught(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        run_erasure(erasing(tmp_path / "out", reference=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml"):
        read_spec(Erasing, tmp_path / "absent.yaml")
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text('{"question": "q"}\n')
    with pytest.raises(InputError, match="line 1"):
        examples(Data(name="jsonl", file=wrong))
    with pytest.raises(InputError, match="11: none has it"):
        run_erasure(erasing(tmp_path / "out", forget={"label": 11}))


def test_images_of_ones_own(tmp_path):
    path = tmp_path / "own.npz"
    images, labels = np.zeros((6, 1, 8, 8), dtype=np.float32), np.array([0, 1, 2, 0, 1, 2])
    np.savez(path, images=images, labels=labels, test_images=images, test_labels=labels)
    found = examples(Data(name="npz", file=path))
    sets = chosen(found, {"label": [1]}, 0, lambda row, _: row)
    assert found.classes == 3 and (len(sets.forget), len(sets.retain), len(sets.unseen)) == (2, 4, 2)
    np.savez(path, images=images[0], labels=labels, test_images=images, test_labels=labels)
    with pytest.raises(InputError, match="shape"):
        examples(Data(name="npz", file=path))


def test_answers_are_predicted_and_questions_are_not(capitals):
    row = encoded(tiny_tokenizer())({"question": "who?", "answer": "me"}, "question")
    text = tiny_tokenizer().decode(row["input_ids"][row["labels"] != -100])
    assert text == " me</s>" and (row["labels"][:4] == -100).all()
    found = examples(Data(name="jsonl", file=capitals, unseen=0.25))
    assert (len(found.train), len(found.test)) == (6, 2)
    with pytest.raises(InputError, match="stands aside"):
        chosen(found, {"question": found.test[0]["question"]}, 0, encoded(tiny_tokenizer()))
    with pytest.raises(InputError, match="all 6"):
        chosen(found, {"topic": ["even", "odd"]}, 0, encoded(tiny_tokenizer()))


def test_facts_have_two_wordings_and_one_answer():
    for package in ("mendeleev", "countryinfo"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = {(fact.subject, fact.field): fact for fact in (*facts.elements(), *facts.countries())}
    assert found["iron", "symbol"].answer == "Fe" and found["gold", "number"].answer == "79"
    assert found["Albania", "capital"].answer == "Tirana"
    assert all(fact.question != fact.paraphrase and fact.answer for fact in found.values())
    assert len(facts.elements()) == 4 * 118
