"""A needle in a haystack: one fact hidden in a long text, and asked for afterwards.

The question comes after the context and is kept apart from it, so that a cache can be cut while nobody
knows yet what will be asked: what a policy keeps by then is all that can be remembered.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vestige.core.spec import Spec, param
from vestige.errors import InputError, SpecError
from vestige.evidence.tasks.haystack import GRAMMAR, check_source, fingerprint, sentences, vocabulary
from vestige.evidence.tasks.hidden import HiddenFacts
from vestige.evidence.tasks.prompts import INTRODUCTION, continuation, fill, frame, split, token_ids
from vestige.evidence.tasks.task import Example, Question

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FORMS", "Form", "Needle", "NeedlePrompt", "NeedleTask", "Recital", "context_batch", "recite"]

QUESTION = "\n\nAccording to the text, what is the {secret} for the {key}?"


@dataclass(frozen=True)
class Form:
    """How a kind of fact is worded: what it is called, what stands before the answer, with it, and after it; the stock
    that an answer is drawn from, and how many different pieces of it make one."""

    secret: str
    said: str
    hidden: str
    end: str
    stock: str | tuple[str, ...]
    pieces: int
    between: str

    def draw(self, chance: random.Random) -> str:
        """An answer."""
        return self.between.join(chance.sample(self.stock, self.pieces))

    @property
    def guess(self) -> float:
        """Probability of guessing an answer."""
        return math.prod(1 / (len(self.stock) - drawn) for drawn in range(self.pieces))


# Without the quotation marks models put them there themselves, and would not recite the words as they stand.
FORMS = {
    "number": Form("pass key", "The pass key for the {key} is", " {answer}", ".", "0123456789", 5, ""),
    "words": Form(
        "pass phrase", 'The pass phrase for the {key} is "', "{answer}", '".', tuple(vocabulary()["words"]), 4, " "
    ),
}


class Needle(Spec):
    """One prompt: a fact at a depth in a text of a length.

    The context (chat header, text and fact) is exactly ``length`` tokens long, so that prompts of one length
    make a batch without padding; the question and the beginning of the answer come on top.

    Attributes:
        length: tokens of the context.
        depth: where the fact stands, 0 (at the beginning of the text) to 1 (at its end); moved to the nearest
            end of a sentence.
        seed: chooses the text and the fact.
        answer: ``"number"``, five different digits, or ``"words"``, four different words.
        distractors: facts of the same kind for other keys, at random places of the text (a multi-key needle).
        haystack: ``"grammar"``, or ``"file:PATH"``; see :mod:`vestige.evidence.tasks.haystack`.

    Raises:
        SpecError: a value of the wrong type or out of range.
        InputError: the haystack's file cannot be used.
    """

    VERSION: ClassVar[int] = 1  # raised whenever the same values would give another prompt
    ceiling: ClassVar[float] = 1.0

    length: int = param(1000, "tokens of the context", ge=1)
    depth: float = param(0.5, "where the fact stands", ge=0, le=1)
    seed: int = param(0, "chooses the text and the fact")
    answer: Literal["number", "words"] = param("number", "five different digits, or four different words")
    distractors: int = param(0, "facts of the same kind for other keys", ge=0)
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")

    def check(self) -> None:
        places = len(vocabulary()["places"])
        if self.distractors >= places:
            raise SpecError(
                f"needle: parameter 'distractors' is {self.distractors}; allowed: int from 0 to {places - 1}"
            )
        check_source(self.haystack)

    @property
    def chance(self) -> float:
        """Probability of reciting the whole answer by guessing among the answers of its kind."""
        return FORMS[self.answer].guess

    def spec(self) -> dict[str, Any]:
        """All that the prompt depends on, as plain JSON types; the haystack's fingerprint stands for its text."""
        return {"name": "needle", "version": self.VERSION, **self._values(), "text": fingerprint(self.haystack)}

    def build(self, tokenizer: PreTrainedTokenizerBase) -> NeedlePrompt:
        """Write the prompt in a model's tokens, as a chat turn if the tokenizer has a chat template.

        Raises:
            InputError: ``length`` cannot hold the fact and the prompt's frame.
        """
        chance = random.Random(f"needle {self.VERSION} {self.seed} {self.answer}")
        form = FORMS[self.answer]
        key, answer = chance.choice(vocabulary()["places"]), form.draw(chance)
        said, hidden = form.said.format(key=key), form.hidden.format(answer=answer)
        opening, closing = frame(tokenizer, INTRODUCTION, QUESTION.format(secret=form.secret, key=key))

        head = token_ids(tokenizer, opening)
        lead = token_ids(tokenizer, f" {said}")
        secret = continuation(tokenizer, f" {said}", hidden)
        needle = [*lead, *secret, *continuation(tokenizer, f" {said}{hidden}", form.end)]
        others = chance.sample([place for place in vocabulary()["places"] if place != key], self.distractors)
        facts = [f" {form.said.format(key=other)}{form.hidden.format(answer=form.draw(chance))}" for other in others]
        lures = [token_ids(tokenizer, f"{fact}{form.end}") for fact in facts]
        room = self.length - len(head) - len(needle) - sum(map(len, lures))
        if room < 0:
            name = "multi-key-needle" if self.distractors else "needle"
            raise InputError(
                f"{name}: length {self.length} is too short; this model needs at least {self.length - room}"
            )
        filler = fill(tokenizer, sentences(self.haystack, self.seed), room)
        for lure in lures:
            filler.insert(chance.randint(0, len(filler)), lure)
        before, after = split(filler, self.depth)
        first = len(head) + len(before) + len(lead)
        return NeedlePrompt(
            needle=self,
            context_ids=(*head, *before, *needle, *after),
            question_ids=tuple(token_ids(tokenizer, f"{closing}{said}")),
            answer_ids=tuple(continuation(tokenizer, f"{closing}{said}", hidden)),
            answer_span=(first, first + len(secret)),
            answer=answer,
        )


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
    """A needle in tokens.

    Attributes:
        needle: what it was made from.
        context_ids: everything up to the end of the haystack; exactly ``needle.length`` tokens.
        question_ids: the question and the beginning of the answer's sentence, to follow the context.
        answer_ids: the tokens that a model which remembers produces next.
        answer_span: first and one-past-last position in the context of the answer's tokens.
        answer: the answer's text.
    """

    needle: Needle
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer_span: tuple[int, int]
    answer: str

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Context and question: the whole prompt."""
        return self.context_ids + self.question_ids

    @property
    def example(self) -> Example:
        """The prompt as tasks have it."""
        question = Question(ids=self.question_ids, answer=self.answer_ids)
        about = {"depth": self.needle.depth, "answer": self.answer}
        return Example(context=self.context_ids, questions=(question,), about=about)


@dataclass(frozen=True)
class Recital:
    """What a model says when asked: its most likely token at every place of the answer."""

    expected: tuple[int, ...]
    said: tuple[int, ...]

    @property
    def found(self) -> bool:
        """Whether greedy decoding gives the answer, all of it."""
        return self.said == self.expected

    @property
    def share(self) -> float:
        """Share of the answer's tokens that are right, each after the right ones before it."""
        return sum(a == b for a, b in zip(self.said, self.expected, strict=True)) / len(self.expected)


def context_batch(prompts: Sequence[NeedlePrompt], device: Any = None) -> Tensor:
    """The contexts of prompts of one length, ``(batch, length)``.

    Raises:
        InputError: the lengths differ.
    """
    import torch

    if len({len(prompt.context_ids) for prompt in prompts}) != 1:
        raise InputError("contexts of different lengths make no batch; choose needles of one length")
    return torch.tensor([prompt.context_ids for prompt in prompts], device=device)


def recite(model: PreTrainedModel, prompts: Sequence[NeedlePrompt], cache: Cache, steps: bool = False) -> list[Recital]:
    """Ask each row of a cache that has read ``prompts``' contexts for its answer. The cache is used up.

    Question and answer go through in one pass. The most likely tokens are all right exactly when greedy
    decoding, token after token, gives the answer. Rows are filled up on the right, where no earlier token sees
    it; so the cache must not drop entries any more, as is true of one made by ``cut``. In ``steps`` they go through
    token by token, for policies that act while decoding.
    """
    from vestige.evidence.tasks.asking import Line, hear

    lines = [
        Line(prompt.question_ids + prompt.answer_ids[:-1], len(prompt.question_ids) - 1, (prompt.answer_ids,))
        for prompt in prompts
    ]
    told = hear(model, cache, lines, steps=steps)
    return [Recital(prompt.answer_ids, heard[0].likely) for prompt, heard in zip(prompts, told, strict=True)]


class NeedleTask(HiddenFacts):
    """Find one fact in a long text.

    Each example is a :class:`Needle`; the value is whether the whole answer comes out.
    """

    name = "needle"
    version = 1

    depths: tuple[float, ...] = param((0.1, 0.3, 0.5, 0.7, 0.9), "where the fact stands, 0 to 1, example by example")
    answer: Literal["number", "words"] = param("number", "five different digits, or four different words")
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")

    def check(self) -> None:
        if not self.depths:
            raise SpecError(f"{self.name}: parameter 'depths' is (); at least one value is needed")
        for depth in self.depths:
            self.needle(depth, 0)

    @property
    def chance(self) -> float:
        return FORMS[self.answer].guess

    def needle(self, depth: float, seed: int) -> Needle:
        """The prompt's description."""
        return Needle(length=self.length, depth=depth, seed=seed, answer=self.answer, haystack=self.haystack)

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        depth = self.depths[index % len(self.depths)]
        return self.needle(depth, seed * _SEEDS + index).build(tokenizer).example


_SEEDS = 1_000_003  # examples of one seed; those of another one begin behind them
