"""The needle: reproducible prompts of an exact length, whose answer stands where it is said to stand."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from tests.evidence.conftest import make_tokenizer
from vestige.errors import InputError, SpecError
from vestige.evidence.tasks.haystack import fingerprint, sentences
from vestige.evidence.tasks.needle import Needle, Recital, context_batch, recite

RAW = make_tokenizer(chat_template=None)


@pytest.mark.parametrize("kind", ["number", "words"])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("length", [260, 701])
def test_the_context_has_the_length_asked_for_and_holds_the_answer_once(tokenizer, length, depth, kind):
    prompt = Needle(length=length, depth=depth, seed=5, answer=kind).build(tokenizer)
    assert len(prompt.context_ids) == length
    text = tokenizer.decode(prompt.context_ids)
    assert text.count(prompt.answer) == 1
    first, last = prompt.answer_span
    assert tokenizer.decode(prompt.context_ids[first:last]).strip() == prompt.answer
    assert tokenizer.decode(prompt.answer_ids).strip() == prompt.answer
    # The question follows the context, and says nothing of the answer.
    question = tokenizer.decode(prompt.question_ids)
    assert "According to the text" in question and prompt.answer not in question
    assert prompt.input_ids == prompt.context_ids + prompt.question_ids


def test_the_depth_is_the_place(tokenizer):
    spans = [Needle(length=900, depth=depth).build(tokenizer).answer_span[0] for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert spans == sorted(spans) and spans[0] < 150 and spans[-1] > 850
    assert abs(spans[2] - 450) < 120


def test_the_prompt_is_a_chat_turn_where_there_is_a_template(tokenizer):
    prompt = Needle(length=300).build(tokenizer)
    text = tokenizer.decode(prompt.input_ids)
    key = re.search(r"The pass key for the ([a-z ]+) is", text)[1]
    turn = re.search(r"^<s><\|user\|>\n(.*)\n<\|assistant\|>\n(.*)$", text, re.DOTALL)
    assert turn and turn[1].endswith(f"According to the text, what is the pass key for the {key}?")
    assert turn[2] == f"The pass key for the {key} is"
    assert prompt.context_ids[0] == tokenizer.bos_token_id


def test_without_a_template_it_is_plain_text():
    prompt = Needle(length=300).build(RAW)
    text = RAW.decode(prompt.input_ids)
    assert (
        text.startswith("Here is a text.") and "<|" not in text and re.search(r"\?\nThe pass key for [a-z ]+ is$", text)
    )


def test_the_same_needle_gives_the_same_prompt_and_another_seed_another(tokenizer):
    needle = Needle(length=400, seed=3)
    assert needle.build(tokenizer) == Needle(length=400, seed=3).build(tokenizer)
    answers = {Needle(length=400, seed=seed).build(tokenizer).answer for seed in range(20)}
    assert len(answers) == 20
    spec = needle.spec()
    assert spec["version"] == Needle.VERSION and spec["text"] == fingerprint("grammar") and spec["seed"] == 3


def test_the_filler_hardly_repeats_and_holds_no_digits():
    drawn = list(itertools.islice(sentences(seed=2), 3000))
    assert len(set(drawn)) > 2950
    assert not any(re.search(r"\d|\{|\ba [aeiou]", sentence) for sentence in drawn)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in drawn)


def test_a_file_serves_as_haystack(tokenizer, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Line {'x' * (i % 7 + 1)} of the book was read." for i in range(40)), encoding="utf-8")
    prompt = Needle(length=900, haystack=f"file:{book}").build(tokenizer)
    assert tokenizer.decode(prompt.context_ids).count("of the book was read.") > 20
    assert len(prompt.context_ids) == 900
    assert fingerprint(f"file:{book}") != fingerprint("grammar")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"length": 0}, "length"),
        ({"length": 10.0}, "length"),
        ({"depth": 1.2}, "depth"),
        ({"depth": float("nan")}, "depth"),
        ({"depth": True}, "depth"),
        ({"seed": 1.5}, "seed"),
        ({"answer": "colour"}, "answer"),
        ({"haystack": "novels"}, "haystack"),
    ],
)
def test_a_wrong_value_is_named(values, names):
    with pytest.raises(SpecError, match=names):
        Needle(**values)


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="absent"):
        Needle(haystack=f"file:{tmp_path / 'absent.txt'}")
    (tmp_path / "short.txt").write_text("One. Two.", encoding="utf-8")
    with pytest.raises(InputError, match="2 sentences"):
        Needle(haystack=f"file:{tmp_path / 'short.txt'}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        Needle(haystack=f"file:{tmp_path / 'bytes.txt'}")


def test_a_context_too_short_says_what_is_needed(tokenizer):
    with pytest.raises(InputError) as failure:
        Needle(length=20).build(tokenizer)
    needed = int(re.search(r"at least (\d+)", str(failure.value))[1])
    assert len(Needle(length=needed).build(tokenizer).context_ids) == needed


def test_chance_is_that_of_guessing():
    assert Needle().chance == pytest.approx(1 / (10 * 9 * 8 * 7 * 6))
    assert Needle(answer="words").chance < 1e-7
    assert Needle.ceiling == 1.0


def test_a_batch_recites_as_each_prompt_alone_and_as_greedy_decoding(toy):
    """One pass over right-filled rows must say what token-by-token decoding with the right answer so far says."""
    model, tokenizer = toy
    prompts = [
        Needle(length=300, seed=seed, answer=kind).build(tokenizer) for seed in range(2) for kind in ("number", "words")
    ]
    with torch.inference_mode():
        batch = model(context_batch(prompts), use_cache=True).past_key_values
        together = recite(model, prompts, batch)
        again = model(context_batch(prompts), use_cache=True).past_key_values
        assert recite(model, prompts, again, steps=True) == together
        for prompt, recital in zip(prompts, together, strict=True):
            alone = model(context_batch([prompt]), use_cache=True).past_key_values
            assert recite(model, [prompt], alone) == [recital]
            said = []
            for i in range(len(prompt.answer_ids)):
                ids = torch.tensor([prompt.input_ids + prompt.answer_ids[:i]])
                said.append(model(ids).logits[0, -1].argmax().item())
            assert recital.said == tuple(said)
    assert not any(recital.found for recital in together)


def test_a_recital_counts():
    assert Recital((1, 2, 3), (1, 2, 3)).found and Recital((1, 2, 3), (1, 2, 3)).share == 1
    assert not Recital((1, 2, 3, 4), (1, 2, 3, 5)).found and Recital((1, 2, 3, 4), (1, 2, 3, 5)).share == 0.75


def test_contexts_of_different_lengths_are_refused(tokenizer):
    prompts = [Needle(length=length).build(tokenizer) for length in (300, 301)]
    with pytest.raises(InputError, match="lengths"):
        context_batch(prompts)


def test_distractors_are_other_facts_of_the_same_kind(tokenizer):
    plain = Needle(length=400, seed=3).build(tokenizer)
    lured = Needle(length=400, seed=3, distractors=4).build(tokenizer)
    text = tokenizer.decode(lured.context_ids)
    assert len(lured.context_ids) == 400 and lured.answer == plain.answer
    assert text.count("The pass key for the") == 5 and tokenizer.decode(plain.context_ids).count("The pass key") == 1
    first, last = lured.answer_span
    assert lured.answer in tokenizer.decode(lured.context_ids[first:last])
    with pytest.raises(SpecError, match="distractors"):
        Needle(distractors=-1)
