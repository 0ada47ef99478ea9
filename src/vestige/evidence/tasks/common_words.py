"""Which words of a long list come most often."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

from vestige.core.spec import param
from vestige.errors import InputError
from vestige.evidence.tasks.haystack import vocabulary
from vestige.evidence.tasks.prompts import continuation, frame, token_ids
from vestige.evidence.tasks.task import ContextTask, Example, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CommonWords"]

_OTHERS = 3  # rarer words that a common one is told from


class CommonWords(ContextTask):
    """Tell the words that come often in a long list from those that come seldom.

    No single place holds the answer: what is kept must stand for the whole list. For each common word the model
    chooses between it and three rare ones. Source: the common words extraction of RULER (arXiv 2404.06654, section
    3.3), which asks for the ten most common words at once.
    """

    name = "common-words"
    version = 1

    common: int = param(4, "common words", ge=1, le=20)
    ratio: int = param(10, "how many times as often as the others they come", ge=2)

    @property
    def chance(self) -> float:
        return 1 / (1 + _OTHERS)

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        chance = random.Random(f"{self.name} {self.version} {seed} {index}")
        words = list(vocabulary()["words"])
        chance.shuffle(words)
        often, seldom = words[: self.common], words[self.common :]
        opening, _ = frame(tokenizer, "Here is a list of words. A question about it follows.\n\n", "")
        ids, listed = token_ids(tokenizer, opening), Counter[str]()
        pieces = {word: token_ids(tokenizer, f" {word},") for word in words}
        full = False
        while not full:
            # Stretches with the same share of each word, so that any part of the list resembles the whole.
            stretch = [*often * self.ratio, *seldom]
            chance.shuffle(stretch)
            for word in stretch:
                full = len(ids) + len(pieces[word]) > self.length
                if full:
                    break
                ids += pieces[word]
                listed[word] += 1
        if any(listed[word] < 2 for word in often):
            raise InputError(f"{self.name}: length {self.length} is too short; its common words do not come twice")
        rare = sorted(seldom, key=lambda word: listed[word])[: max(_OTHERS, len(seldom) // 2)]
        questions = [self._question(tokenizer, chance, word, chance.sample(rare, _OTHERS)) for word in often]
        return Example(context=tuple(ids), questions=tuple(questions), about={"answer": often})

    def _question(
        self, tokenizer: PreTrainedTokenizerBase, chance: random.Random, word: str, others: list[str]
    ) -> Question:
        offered = [word, *others]
        chance.shuffle(offered)
        asked = f"\n\nWhich of these words comes most often in the list: {', '.join(offered)}?"
        before = f"{frame(tokenizer, '', asked)[1]}The word that comes most often is"
        return Question(
            ids=tuple(token_ids(tokenizer, before)),
            choices=tuple(tuple(continuation(tokenizer, before, f" {other}")) for other in offered),
            right=offered.index(word),
        )
