"""Texts in which pass keys are hidden and asked for at the end: what plans of heads are fitted on.

A model that continues such a text must copy from far back, so what a head's far sight is worth shows in the answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vestige.core.anatomy import Anatomy
from vestige.core.haystack import GRAMMAR, check_source, sentences, vocabulary
from vestige.errors import InputError, SpecError

__all__ = ["Sample", "check_samples", "copies", "pass_keys"]

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
DEPTHS = (0.05, 0.95)  # of the text, between which keys are hidden


@dataclass(frozen=True)
class Sample:
    """A text and the part of it that counts.

    Attributes:
        ids: token ids.
        counts: which tokens are answers: what the model says at the token before each is what matters.

    Raises:
        InputError: the two differ in length, or no token but the first counts.
    """

    ids: tuple[int, ...]
    counts: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.counts):
            raise InputError(f"a sample has {len(self.ids)} tokens and {len(self.counts)} marks; it needs one for each")
        if not any(self.counts[1:]):
            raise InputError("a sample in which no token counts teaches nothing; mark those of its answers")

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(1, length)`` token ids, and ``(length - 1,)`` whether what is said *at* a token counts."""
        return torch.tensor([self.ids], device=device), torch.tensor(self.counts[1:], device=device)


def pass_keys(
    tokenizer: Any, lengths: Sequence[int], *, keys: int = 5, words: int = 8, seed: int = 0, haystack: str = GRAMMAR
) -> Iterator[Sample]:
    """An endless stream of samples, each of a length drawn from ``lengths``.

    Args:
        lengths: tokens of a sample, questions and answers included.
        keys: pass keys in a text, at most 10.
        words: words of a pass key.
        haystack: the filler; see :mod:`vestige.core.haystack`.

    Raises:
        SpecError: more keys than there are names for, or fewer than one key or word.
        InputError: the keys and their questions do not fit the shortest length.
    """
    if not 1 <= keys <= len(ORDINALS) or words < 1:
        raise SpecError(f"'keys' is {keys!r} and 'words' is {words!r}; allowed: 1 to {len(ORDINALS)} keys, words >= 1")
    check_source(haystack)
    shortest = _write(tokenizer, min(lengths), random.Random(f"pass keys {seed}"), keys, words, haystack)

    def stream() -> Iterator[Sample]:
        chance = random.Random(f"pass keys {seed}")
        while True:
            yield _write(tokenizer, chance.choice(list(lengths)), chance, keys, words, haystack)

    assert shortest
    return stream()


def copies(words: Sequence[int], length: int, count: int, *, copied: int = 8, seed: int = 0) -> list[Sample]:
    """Texts of random tokens whose end repeats a stretch from somewhere in them: for models without a tokenizer.

    Args:
        words: tokens to draw from.
        length: tokens of a text.
        count: how many texts.
        copied: tokens of the stretch that comes again; they count.

    Raises:
        InputError: a text has no room for the stretch twice.
    """
    if length < 2 * copied:
        raise InputError(f"a text of {length} tokens is too short to repeat {copied} of them")
    chance, texts = random.Random(f"copies {seed}"), []
    for _ in range(count):
        text = chance.choices(words, k=length - copied)
        start = chance.randrange(length - 2 * copied + 1)
        counts = [False] * (length - copied) + [True] * copied
        texts.append(Sample((*text, *text[start : start + copied]), tuple(counts)))
    return texts


def check_samples(samples: Sequence[Sample], anatomy: Anatomy, least: int, why: str) -> None:
    """Raise :class:`InputError` unless each sample has more than ``least`` tokens, and no more than the model reads."""
    if not samples:
        raise InputError("there are no samples to fit on")
    short = min(len(sample.ids) for sample in samples)
    if short <= least:
        raise InputError(f"a sample of {short} tokens is too short: {why}; give texts of more than {least} tokens")
    longest = max(len(sample.ids) for sample in samples)
    if longest > anatomy.max_positions:
        raise InputError(f"a sample of {longest} tokens is too long: the model reads {anatomy.max_positions}")


def _write(tokenizer: Any, length: int, chance: random.Random, keys: int, words: int, haystack: str) -> Sample:
    """Filler with the keys at random depths, then a question and its answer for each key."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    drawn = [" ".join(chance.choices(vocabulary()["words"], k=words)) for _ in range(keys)]
    hidden = [
        ids(f"\n\nRemember: the {name} pass key is {key}.\n\n") for name, key in zip(ORDINALS, drawn, strict=False)
    ]
    asked = [
        (ids(f"\n\nQuestion: what is the {name} pass key?\nAnswer: the {name} pass key is"), ids(f" {key}."))
        for name, key in zip(ORDINALS, drawn, strict=False)
    ]
    room = length - sum(map(len, hidden)) - sum(len(question) + len(answer) for question, answer in asked)
    if room < 0:
        raise InputError(
            f"a text of {length} tokens is too short for {keys} pass keys of {words} words; "
            f"give lengths of {length - room} or more, or fewer keys"
        )
    source = sentences(haystack, chance.randrange(2**31))
    filler: list[int] = []
    while len(filler) < room:
        filler += ids(" " + " ".join(next(source) for _ in range(8)))
    cuts = sorted(round(chance.uniform(*DEPTHS) * room) for _ in range(keys))
    text: list[int] = []
    for start, end, key in zip([0, *cuts], [*cuts, room], [*hidden, []], strict=True):
        text += filler[start:end] + key
    counts = [False] * len(text)
    for question, answer in asked:
        text += question + answer
        counts += [False] * len(question) + [True] * len(answer)
    return Sample(tuple(text), tuple(counts))
