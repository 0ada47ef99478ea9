"""Following a chain of names to its value."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from vestige.core.spec import param
from vestige.errors import SpecError
from vestige.evidence.tasks.haystack import GRAMMAR, vocabulary
from vestige.evidence.tasks.hidden import HiddenFacts
from vestige.evidence.tasks.prompts import INTRODUCTION, continuation, frame, token_ids
from vestige.evidence.tasks.task import Example, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VariableTracking"]

_NAMES = tuple(f"X{number}" for number in range(10, 100))


class VariableTracking(HiddenFacts):
    """Say what a variable holds that was set to another, which was set to another, and so on to a word.

    Several chains lie between each other in the text, each in its order; the answer is chosen among their words. What
    is kept must hold all links of a chain, though none of them names both ends. Source: the variable tracking task
    of RULER (arXiv 2404.06654, section 3.2), which asks the other way round: for all variables of a value.
    """

    name = "variable-tracking"
    version = 1

    chains: int = param(4, "chains, among whose words the answer is chosen", ge=2, le=30)
    hops: int = param(1, "links between the variable asked for and the one that is given a word", ge=0, le=20)
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")

    def check(self) -> None:
        super().check()
        needed = self.chains * (self.hops + 1)
        if needed > len(_NAMES):
            raise SpecError(
                f"{self.name}: parameters 'chains' and 'hops' are {self.chains} and {self.hops}, which takes {needed} "
                f"variables; allowed: up to {len(_NAMES)}, chains * (hops + 1)"
            )

    @property
    def chance(self) -> float:
        return 1 / self.chains

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        chance = random.Random(f"{self.name} {self.version} {seed} {index}")
        words = chance.sample(vocabulary()["words"], self.chains)
        names = chance.sample(_NAMES, self.chains * (self.hops + 1))
        chains = [names[first :: self.chains] for first in range(self.chains)]
        links = [[word, *chain] for word, chain in zip(words, chains, strict=True)]
        turns = [chain for chain in range(self.chains) for _ in range(self.hops + 1)]
        chance.shuffle(turns)  # whose turn it is; within a chain the order stays
        facts, said = [], [0] * self.chains
        for chain in turns:
            value, name = links[chain][said[chain] : said[chain] + 2]
            facts.append(f"Let {name} be {value}.")
            said[chain] += 1
        right = chance.randrange(self.chains)
        asked = chains[right][-1]
        opening, closing = frame(tokenizer, INTRODUCTION, f"\n\nAccording to the text, which word is {asked}?")
        context = self.hide(tokenizer, opening, facts, chance)
        before = f"{closing}{asked} is"
        choices = tuple(tuple(continuation(tokenizer, before, f" {word}")) for word in words)
        question = Question(ids=tuple(token_ids(tokenizer, before)), choices=choices, right=right)
        return Example(context=context, questions=(question,), about={"answer": words[right]})
