"""A needle in a haystack: one fact hidden in a long text, and asked for afterwards.

The question comes after the context and is kept apart from it, so that a cache can be cut while nobody
knows yet what will be asked: what a policy keeps by then is all that can be remembered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vestige.errors import InputError, SpecError
from vestige.evidence.tasks.haystack import GRAMMAR, check_source, fingerprint, sentences, vocabulary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Needle", "NeedlePrompt", "Recital", "context_batch", "recite"]

INTRODUCTION = "Here is a text. A question about it follows.\n\n"
QUESTION = "\n\nAccording to the text, what is the {secret} for the {key}?"


@dataclass(frozen=True)
class _Form:
    """How a kind of fact is worded: what it is called, what stands before the answer, with it, and after it."""

    secret: str
    said: str
    hidden: str
    end: str


# Without the quotation marks models put them there themselves, and would not recite the words as they stand.
_FORMS = {
    "number": _Form("pass key", "The pass key for the {key} is", " {answer}", "."),
    "words": _Form("pass phrase", 'The pass phrase for the {key} is "', "{answer}", '".'),
}

_DIGITS, _WORD_COUNT = 5, 4


@dataclass(frozen=True, kw_only=True)
class Needle:
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

    length: int = 1000
    depth: float = 0.5
    seed: int = 0
    answer: Literal["number", "words"] = "number"
    distractors: int = 0
    haystack: str = GRAMMAR

    def __post_init__(self) -> None:
        if type(self.length) is not int or self.length < 1:
            raise SpecError(f"needle: parameter 'length' is {self.length!r}; allowed: int >= 1 (tokens)")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int | float) or not 0 <= self.depth <= 1:
            raise SpecError(f"needle: parameter 'depth' is {self.depth!r}; allowed: number from 0 to 1")
        if type(self.seed) is not int:
            raise SpecError(f"needle: parameter 'seed' is {self.seed!r}; allowed: int")
        if self.answer not in _FORMS:
            raise SpecError(f"needle: parameter 'answer' is {self.answer!r}; allowed: {' | '.join(map(repr, _FORMS))}")
        places = len(vocabulary()["places"])
        if type(self.distractors) is not int or not 0 <= self.distractors < places:
            raise SpecError(
                f"needle: parameter 'distractors' is {self.distractors!r}; allowed: int from 0 to {places - 1}"
            )
        check_source(self.haystack)

    @property
    def chance(self) -> float:
        """Probability of reciting the whole answer by guessing among the answers of its kind."""
        possible = 1
        choices = 10 if self.answer == "number" else len(vocabulary()["words"])
        for drawn in range(_DIGITS if self.answer == "number" else _WORD_COUNT):
            possible *= choices - drawn
        return 1 / possible

    def spec(self) -> dict[str, Any]:
        """All that the prompt depends on, as plain JSON types; the haystack's fingerprint stands for its text."""
        return {"name": "needle", "version": self.VERSION, **asdict(self), "text": fingerprint(self.haystack)}

    def build(self, tokenizer: PreTrainedTokenizerBase) -> NeedlePrompt:
        """Write the prompt in a model's tokens, as a chat turn if the tokenizer has a chat template.

        Raises:
            InputError: ``length`` cannot hold the fact and the prompt's frame.
        """
        chance = random.Random(f"needle {self.VERSION} {self.seed} {self.answer}")
        key, answer = chance.choice(vocabulary()["places"]), self._draw(chance)
        form = _FORMS[self.answer]
        said, hidden = form.said.format(key=key), form.hidden.format(answer=answer)
        opening, closing = _frame(tokenizer, INTRODUCTION, QUESTION.format(secret=form.secret, key=key))

        head = _ids(tokenizer, opening)
        lead = _ids(tokenizer, f" {said}")
        secret = _continuation(tokenizer, f" {said}", hidden)
        needle = [*lead, *secret, *_continuation(tokenizer, f" {said}{hidden}", form.end)]
        others = chance.sample([place for place in vocabulary()["places"] if place != key], self.distractors)
        facts = [f" {form.said.format(key=other)}{form.hidden.format(answer=self._draw(chance))}" for other in others]
        lures = [_ids(tokenizer, f"{fact}{form.end}") for fact in facts]
        room = self.length - len(head) - len(needle) - sum(map(len, lures))
        if room < 0:
            raise InputError(
                f"needle: length {self.length} is too short; this model needs at least {self.length - room}"
            )
        filler = _fill(tokenizer, sentences(self.haystack, self.seed), room)
        for lure in lures:
            filler.insert(chance.randint(0, len(filler)), lure)
        before, after = _split(filler, self.depth)
        first = len(head) + len(before) + len(lead)
        return NeedlePrompt(
            needle=self,
            context_ids=(*head, *before, *needle, *after),
            question_ids=tuple(_ids(tokenizer, f"{closing}{said}")),
            answer_ids=tuple(_continuation(tokenizer, f"{closing}{said}", hidden)),
            answer_span=(first, first + len(secret)),
            answer=answer,
        )

    def _draw(self, chance: random.Random) -> str:
        if self.answer == "number":
            return "".join(chance.sample("0123456789", _DIGITS))
        return " ".join(chance.sample(vocabulary()["words"], _WORD_COUNT))


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


def recite(model: PreTrainedModel, prompts: Sequence[NeedlePrompt], cache: Cache) -> list[Recital]:
    """Ask each row of a cache that has read ``prompts``' contexts for its answer. The cache is used up.

    Question and answer go through in one pass. The most likely tokens are all right exactly when greedy
    decoding, token after token, gives the answer. Rows are filled up on the right, where no earlier token sees
    it; so the cache must not drop entries any more, as is true of one made by ``cut``.
    """
    import torch

    lines = [prompt.question_ids + prompt.answer_ids[:-1] for prompt in prompts]
    width = max(map(len, lines))
    rows = torch.tensor([[*line, *[line[-1]] * (width - len(line))] for line in lines], device=model.device)
    needed = width - min(len(prompt.question_ids) for prompt in prompts) + 1
    with torch.inference_mode():
        logits = model(rows, past_key_values=cache, use_cache=True, logits_to_keep=needed).logits
    likely = logits.argmax(dim=-1).tolist()
    recitals = []
    for prompt, row in zip(prompts, likely, strict=True):
        first = len(prompt.question_ids) - 1 - (width - needed)
        recitals.append(Recital(prompt.answer_ids, tuple(row[first : first + len(prompt.answer_ids)])))
    return recitals


def _frame(tokenizer: PreTrainedTokenizerBase, introduction: str, question: str) -> tuple[str, str]:
    """What stands before the haystack, and what stands after it up to the answer."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": f"{introduction}{mark}{question}"}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        opening, found, closing = whole.partition(mark)
        if found:
            return opening.rstrip(" "), closing
    start = tokenizer.bos_token if _adds_start(tokenizer) else ""
    return f"{start}{introduction}", f"{question}\n"


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer begins a text with a start token of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _continuation(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> list[int]:
    """Tokens of ``after`` where it follows ``before``; on its own where the two melt together."""
    head, whole = _ids(tokenizer, before), _ids(tokenizer, before + after)
    return whole[len(head) :] if whole[: len(head)] == head else _ids(tokenizer, after)


def _fill(tokenizer: PreTrainedTokenizerBase, source: Any, room: int) -> list[list[int]]:
    """Sentences of ``room`` tokens together; the first is cut at its beginning to fit, as in an excerpt."""
    filler: list[list[int]] = []
    missing = room
    while missing > 0:
        texts = [f" {next(source)}" for _ in range(max(4, missing // 24))]
        for ids in tokenizer(texts, add_special_tokens=False).input_ids:
            if missing > 0:
                filler.append(ids)
                missing -= len(ids)
    if missing < 0:
        filler.insert(0, filler.pop()[-missing:])
    return filler


def _split(filler: list[list[int]], depth: float) -> tuple[list[int], list[int]]:
    """The filler before and after the end of a sentence that is nearest to ``depth``."""
    ends = [0]
    for ids in filler:
        ends.append(ends[-1] + len(ids))
    wanted = depth * ends[-1]
    cut = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
    flat = [token for ids in filler for token in ids]
    return flat[: ends[cut]], flat[ends[cut] :]
