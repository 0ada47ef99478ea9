"""Streams, the trainer, its result, and taking up a run that was killed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import DefaultDataCollator, TrainerCallback

import vestige
from tests.weights.common import arguments, blobs, learn, stream, vit
from vestige.core.ledger import Ledger
from vestige.errors import InputError, SpecError, TrainingError
from vestige.weights.retain import ContinualRun, ContinualTrainer, Stream
from vestige.weights.retain.learner import Learner
from vestige.weights.retain.padding import PadTokens
from vestige.weights.retain.session import Collate, Session


def test_by_class_splits_train_and_test():
    found = stream()
    assert [e.classes for e in found] == [(0, 1), (2, 3), (4, 5)]
    for e in found:
        for part in (e.train, e.test):
            assert {part[n]["labels"] for n in range(len(part))} == set(e.classes)
    assert found.seen(1) == (0, 1, 2, 3)


def test_seed_orders_classes_and_blur_mixes_them_but_keeps_sizes():
    assert [e.classes for e in stream(seed=3)] != [e.classes for e in stream()]
    blurred = stream(blur=0.5, seed=0)
    assert [len(e.train) for e in blurred] == [16, 16, 16]
    strangers = [sum(e.train[n]["labels"] not in e.classes for n in range(16)) for e in blurred]
    assert all(0 < s <= 8 for s in strangers)
    rows = sorted(r for e in blurred for r in e.train.rows.tolist())
    assert rows == list(range(48))


def test_by_column_of_a_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"pixel_values": [[1.0]] * 4, "labels": [0, 1, 0, 1], "year": [2, 1, 1, 2]})
    found = Stream.by_column(rows, rows, "year")
    assert found.names == ["1", "2"]
    assert found.kind == "domain"
    assert set(found[0].train[0]) == {"pixel_values", "labels", "index", "task"}
    with pytest.raises(InputError, match="no column 'yaer'"):
        Stream.by_column(rows, rows, "yaer")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Stream.of([]), "no experiences"),
        (lambda: Stream.of([(blobs(), blobs()), (blobs(), TensorDataset(torch.empty(0)))]), "1 .1. has no test"),
        (lambda: stream(experiences=[[0, 1], [1, 2]]), "two experiences"),
        (lambda: stream(experiences=[[0, 1], [7]]), "label 7"),
        (lambda: stream(experiences=9), "1 to 6"),
        (lambda: stream(blur=1.5), "'blur' is 1.5"),
        (lambda: Stream.of([(blobs(), blobs())], kind="task"), "needs the classes"),
        (lambda: Stream.of([(blobs(), blobs())], kind="tusk"), "did you mean task"),
        (lambda: Stream.of([blobs()]), "part 0 is a TensorDataset; allowed: a training and a test"),
        (lambda: Stream.of([(DataLoader(blobs()), blobs())]), "part 0 is a DataLoader; allowed: a dataset with a len"),
        (lambda: Stream.by_class(DataLoader(blobs()), blobs(), experiences=3), "train is a DataLoader"),
        (lambda: stream(experiences=[0, 1]), r"'experiences' is \[0, 1\]"),
        (lambda: stream(experiences="2"), "'experiences' is '2'"),
    ],
)
def test_wrong_streams_are_refused(build, text):
    with pytest.raises((InputError, SpecError), match=text):
        build()


def test_a_column_of_labels_may_have_any_name():
    datasets = pytest.importorskip("datasets")
    images, labels = blobs().tensors
    for column in ("label", "shape"):
        rows = datasets.Dataset.from_dict({"pixel_values": images.tolist(), column: labels.tolist()})
        found = Stream.by_class(rows, rows, experiences=3, label=column)
        assert set(found[1].train[0]) == {"pixel_values", "labels", "index", "task"}
        run, _ = learn("s3ft", on=found, args=arguments(max_steps=1))
        assert run.matrix.shape == (3, 3)
        with pytest.raises(InputError, match=f"no column 'labls'.*{column}"):
            Stream.by_class(rows, rows, experiences=3, label="labls")


def test_columns_that_the_model_does_not_take_are_left_out():
    images, labels = blobs().tensors
    pairs = list(zip(images, labels.tolist(), strict=True))
    plain = [{"pixel_values": image, "labels": label} for image, label in pairs]
    wide = [{**row, "file": f"{n}.png", "shade": n} for n, row in enumerate(plain)]
    args = arguments(max_steps=3)
    runs = [learn("replay", on=Stream.by_class(rows, rows, experiences=2), args=args)[0] for rows in (plain, wide)]
    assert np.array_equal(runs[0].matrix, runs[1].matrix)
    assert runs[0].replay_bytes == runs[1].replay_bytes


def test_domains_may_be_blurred():
    rows = [{"labels": n, "where": "ab"[n // 10]} for n in range(20)]
    blurred = Stream.by_column(rows, rows, "where", blur=0.5, seed=1)
    held = [[e.train[n]["labels"] for n in range(10)] for e in blurred]
    strangers = [sum(label // 10 != n for label in part) for n, part in enumerate(held)]
    assert 0 < strangers[0] == strangers[1] <= 5
    assert sorted(held[0] + held[1]) == list(range(20))
    assert [e.test[0]["labels"] for e in blurred] == [0, 10]
    with pytest.raises(SpecError, match="'blur' is 2"):
        Stream.by_column(rows, rows, "where", blur=2)


def test_a_row_that_strayed_into_another_task_is_asked_among_the_labels_of_its_own():
    learn("replay", on=stream(kind="task", blur=0.5, seed=0))  # no label is one that cannot be given
    here = Session(vit(), stream(kind="task"), arguments(), Collate(DefaultDataCollator()))
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = here.objective(SimpleNamespace(logits=logits), {"labels": torch.tensor([1, 4, 4])}, torch.tensor([0, 0, 2]))
    pairs = torch.stack([logits[0, :2], logits[1, 4:], logits[2, 4:]])
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(pairs, torch.tensor([1, 0, 0])))


def test_finetuning_forgets_and_joint_does_not():
    args = arguments(num_train_epochs=25)
    lost, _ = learn("finetune", args=args)
    kept, _ = learn("joint", args=args)
    assert lost.matrix.shape == (3, 3)
    assert lost.plasticity > 0.9
    assert lost.forgetting > 0.8
    assert kept.average > 0.9


def test_metrics_are_what_they_say():
    matrix = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 0.7]])
    run = ContinualRun(learner={"name": "x"}, names=["a", "b", "c"], matrix=matrix, untrained=np.array([0.1] * 3))
    assert run.average == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert run.forgetting == pytest.approx((0.3 + 0.4) / 2)
    assert run.backward_transfer == pytest.approx((-0.3 - 0.4) / 2)
    assert run.forward_transfer == pytest.approx((0.1 + 0.2) / 2)
    assert run.plasticity == pytest.approx(0.8)
    assert run.table().loc["b", "c"] == 0.3
    assert run.figure().data[0].z.tolist() == matrix.tolist()


def test_a_task_stream_asks_among_the_labels_of_the_task():
    run, model = learn("finetune", on=stream(kind="task"), args=arguments(num_train_epochs=1, learning_rate=0.0))
    with torch.no_grad():
        for n, experience in enumerate(stream()):
            rows = [experience.test[i] for i in range(len(experience.test))]
            logits = model.eval()(torch.stack([r["pixel_values"] for r in rows])).logits[:, list(experience.classes)]
            right = torch.tensor([experience.classes.index(r["labels"]) for r in rows])
            assert run.untrained[n] == pytest.approx(float((logits.argmax(-1) == right).float().mean()))


def test_a_class_stream_asks_among_its_labels_and_of_general_rows_among_all():
    model = vit(labels=8)  # with two classes that the stream knows nothing of
    with torch.no_grad():
        model.classifier.bias[6] = 100.0
    images, _ = blobs(12, seed=2).tensors
    others = [{"pixel_values": image, "labels": 6} for image in images]
    run, _ = learn("finetune", model, args=arguments(max_steps=1, learning_rate=1e-6), held_out=others)
    assert run.untrained.sum() > 0  # one of six is right by chance, where the seventh would be said throughout
    assert run.general == [1.0] * 4


class _Cut(Exception):  # noqa: N818
    pass


def saving(folder):
    return arguments(folder, save_strategy="steps", save_steps=2, save_total_limit=2)


@pytest.fixture(scope="module", params=["replay", {"name": "rehearsal-free", "ewc": 1.0, "feature": 0.1}, "joint"])
def uncut(request, tmp_path_factory):
    """A learner, and what comes of it where nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, *learn(request.param, vit(hidden_dropout_prob=0.1), args=saving(folder))


@pytest.mark.parametrize(("experience", "step"), [(0, 2), (1, 3), (2, 0)])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, uncut, experience, step):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if f"experience-{experience}" in args.output_dir and state.global_step == step:
                raise _Cut

    spec, whole, model = uncut
    with pytest.raises(_Cut):
        learn(spec, vit(hidden_dropout_prob=0.1), args=saving(tmp_path / "cut"), callbacks=[Kill()])
    fresh = vit(hidden_dropout_prob=0.1)
    run = ContinualTrainer(fresh, spec, saving(tmp_path / "cut")).run(stream(), resume=True)
    assert np.array_equal(run.matrix, whole.matrix)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert not list((tmp_path / "cut").glob("experience-*"))


def test_every_experience_is_learnt_in_the_precision_asked_for():
    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(kind[-1])

    model, seen, kind = vit(), [], []
    model.classifier.register_forward_hook(lambda part, given, out: kind.append(out.dtype))
    learn("finetune", model, args=arguments(bf16=True, max_steps=2), callbacks=[Watch()])
    assert seen == [torch.bfloat16] * 6
    assert "forward" not in vars(model)
    learn("finetune", model, args=arguments(max_steps=1), callbacks=[Watch()])
    assert seen[6:] == [torch.float32] * 3


def test_a_folder_with_another_run_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="epoch", max_steps=2)
    learn("finetune", args=args)
    before = vit()
    with pytest.raises(SpecError, match="resume=True"):
        learn("finetune", before, args=args)
    with pytest.raises(SpecError, match="another learner"):
        ContinualTrainer(before, "replay", args).run(stream(), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), vit().parameters(), strict=True))


def test_a_run_that_was_refused_before_any_work_leaves_no_run_behind(tmp_path):
    args = arguments(tmp_path, save_strategy="epoch", max_steps=1)
    with pytest.raises(SpecError, match="'components' is 10"):
        learn("coda-prompt", args=args)
    learn({"name": "coda-prompt", "components": 4}, args=args)
    with pytest.raises(SpecError, match="resume=True"):
        learn("coda-prompt", args=args)


def test_accumulated_micro_batches_give_the_update_of_the_whole_batch():
    whole = arguments(max_steps=2, optim="sgd", learning_rate=0.1)
    parts = arguments(max_steps=2, optim="sgd", learning_rate=0.1, per_device_train_batch_size=4)
    parts.gradient_accumulation_steps = 2
    models = [learn("finetune", args=args)[1] for args in (whole, parts)]
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_loss_that_is_no_number_stops_and_keeps_finite_weights():
    bad = blobs()
    bad.tensors[0][bad.tensors[1] == 3] = float("nan")
    broken = Stream.by_class(bad, blobs(30, seed=1), experiences=3)
    model = vit()
    with pytest.raises(TrainingError, match=r"the loss is nan in experience 1 \(2,3\) at step 0") as stopped:
        learn("finetune", model, on=broken)
    assert stopped.value.run.matrix.shape == (1, 3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_ledger_gets_the_result(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run, _ = learn("replay", ledger=ledger, model_name="tiny")
    (row,) = ledger.rows()
    assert row["method"] == vestige.method("replay").spec()
    assert row["metrics"] == pytest.approx(run.metrics())
    assert row["replay_bytes"] == run.replay_bytes > 48 * 64 * 4


def test_peft_models_train_their_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(vit(), config)

    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    learn(vestige.method("replay", size=12), model, args=args)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
    again = adapted()
    ContinualTrainer(again, vestige.method("replay", size=12), args).run(stream(), resume=True)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_language_models_are_scored_by_likelihood():
    from vestige.models.tiny import tiny_model

    class Text(torch.utils.data.Dataset):
        def __init__(self, seed):
            self.ids = torch.randint(3, 97, (12, 10), generator=torch.Generator().manual_seed(seed))

        def __len__(self):
            return len(self.ids)

        def __getitem__(self, n):
            return {"input_ids": self.ids[n], "labels": self.ids[n]}

    model = tiny_model("llama", seed=5)
    domains = Stream.of({"one": (Text(0), Text(0)), "two": (Text(1), Text(1))})
    learner = Learner.from_spec("replay") + Learner.from_spec(
        {"name": "rehearsal-free", "head": "softmax", "feature": 0.01, "l2": 0.01}
    )
    run, _ = learn(learner, model, on=domains, held_out=Text(2), args=arguments(num_train_epochs=3))
    assert run.unit == "log-likelihood"
    assert run.matrix[0, 0] > run.untrained[0]
    assert len(run.general) == 3
    assert run.general_kept == run.general[-1] - run.general[0]
    with torch.no_grad():
        each = [model.eval()(**{k: v[None] for k, v in row.items()}).loss for row in Text(2)]
    assert run.metrics()["perplexity"] == pytest.approx(float(torch.stack(each).mean().exp()), rel=1e-4)
    assert run.metrics()["perplexity_before"] == pytest.approx(np.exp(-run.general[0]))


def test_sums_of_learners():
    both = Learner.from_spec("replay") + Learner.from_spec("rehearsal-free")
    assert Learner.from_spec(both.spec()) == both
    assert both.label == "replay + rehearsal-free"
    with pytest.raises(SpecError, match="'replay' stands twice"):
        both + vestige.method("replay", size=3)
    with pytest.raises(SpecError, match="unknown method 'replai'"):
        Learner.from_spec({"learners": ["replai", "joint"]})
    for name in ("sefe", "control-llm", {"name": "coda-prompt", "components": 4}):  # joint starts anew, by names
        with pytest.raises(SpecError, match="needs structure for itself"):
            Learner.from_spec("joint") + Learner.from_spec(name)


@pytest.mark.parametrize(("one", "other"), [("prototype-relation", "fpf"), ("adaptive-svd", "joint")])
def test_sums_that_are_not_refused_run(one, other):
    run, _ = learn(Learner.from_spec(one) + Learner.from_spec(other), args=arguments(max_steps=2))
    assert run.matrix.shape == (3, 3)


def test_a_label_that_is_out_of_range_is_told_with_its_row_before_the_model_sees_it():
    class Late(torch.utils.data.Dataset):  # whose labels are known row by row alone
        def __len__(self):
            return 48

        def __getitem__(self, n):
            image, label = blobs()[n]
            return image, 6 if n == 17 else int(label)

    model = vit()
    with pytest.raises(InputError, match="row 17 of experience 1: label 6 is out of range; allowed: 0 to 5") as stopped:
        learn("finetune", model, on=Stream.of([(blobs(), blobs()), (Late(), blobs())]))
    assert stopped.value.run.matrix.shape == (1, 2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_tokens_that_are_out_of_range_are_refused():
    from vestige.models.tiny import tiny_model

    rows = [{"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([-100, 4, last])} for last in (5, 6, 5000)]
    with pytest.raises(InputError, match="row 2 of experience 0: label 5000 is out of range; allowed: 0 to"):
        learn("finetune", tiny_model("llama"), on=Stream.of([(rows[:2], rows)]))
    rows = [{"input_ids": torch.tensor([3, token]), "labels": torch.tensor([-100, 4])} for token in (5, -1)]
    with pytest.raises(InputError, match="row 1 of experience 0: token -1 is out of range"):
        learn("finetune", tiny_model("llama"), on=Stream.of([(rows, rows[:1])]))


def test_rows_that_cannot_be_put_together_are_told_with_what_would():
    from vestige.models.tiny import tiny_model

    rows = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in (4, 4, 6)]
    domains = Stream.of([(rows, rows)])
    with pytest.raises(InputError, match=r"row 0 of experience 0 and those beside it .*PadTokens"):
        learn("finetune", tiny_model("llama"), on=domains)
    model = copy.deepcopy(tiny_model("llama"))
    ContinualTrainer(model, "finetune", arguments(max_steps=1), collator=PadTokens()).run(domains)
    assert tiny_model("llama").config.use_cache and model.config.use_cache
    assert model(rows[0]["input_ids"][None]).past_key_values is not None


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InputError, match="label 5; the model has labels 0 to 3"):
        learn("finetune", vit(labels=4))
    with pytest.raises(SpecError, match="eval_strategy"):
        learn("finetune", args=arguments(eval_strategy="epoch"))
    images, labels = blobs().tensors
    wrong = {
        "row 3 of the dataset: label 9 is out of": TensorDataset(images, torch.where(labels == 3, 9, labels)),
        "row 2 of the dataset: label -1 is out of": TensorDataset(images, torch.where(labels == 2, -1, labels)),
        "row 0 of the dataset has the label": TensorDataset(images, labels.float()),
        "has no 'labels'; it has pixel_values": [{"pixel_values": image} for image in images],
    }
    for text, rows in wrong.items():
        before = vit()
        with pytest.raises(InputError, match=text):
            learn("finetune", before, on=Stream.of([(blobs(), blobs()), (rows, blobs())]))
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), vit().parameters(), strict=True))
    with pytest.raises(InputError, match="label 7 is out of range"):
        learn("gere", general=[{"pixel_values": image, "labels": 7} for image in images])
    with pytest.raises(InputError, match=r"experience 0 \(0,1\) has 16 train examples, less than a batch of 32"):
        learn("finetune", args=arguments(dataloader_drop_last=True, per_device_train_batch_size=32))
    with pytest.raises(InputError, match="held_out is a DataLoader"):
        learn("finetune", held_out=DataLoader(blobs()))
    with pytest.raises(InputError, match="model is a str"):
        learn("finetune", "vit")
    with pytest.raises(vestige.errors.UnsupportedModelError, match="ViTModel gives no logits"):
        learn("finetune", vit().vit)
    with pytest.raises(SpecError, match="split by class"):
        learn("rehearsal-free", on=Stream.of([(blobs(), blobs())]))
    frozen = vit().requires_grad_(False)
    with pytest.raises(vestige.errors.UnsupportedModelError, match="no parameter"):
        learn("finetune", frozen)
