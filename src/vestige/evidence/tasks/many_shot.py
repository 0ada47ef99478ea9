"""Classification learnt from the context alone."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Literal

from vestige.core.spec import param
from vestige.errors import InputError, SpecError
from vestige.evidence.data.labelled import labelled
from vestige.evidence.data.text import fingerprint
from vestige.evidence.tasks.haystack import vocabulary
from vestige.evidence.tasks.prompts import continuation, frame, token_ids
from vestige.evidence.tasks.task import ContextTask, Example, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ManyShot"]


class ManyShot(ContextTask):
    """Classify things after many examples in the context, which are all that says what the classes are called.

    A line of the context gives a thing and its class. With ``labels="new"`` the classes bear words drawn anew for each
    example, so that knowing the things is not enough. Things that are asked for do not stand in the context; where
    there are fewer things than lines, they come again.
    """

    name = "many-shot"
    version = 1

    things: str = param("town", "what is classified: town, elements, countries, wordnet, or 'file:PATH' for a CSV")
    classes: int = param(4, "classes, among which the answer is chosen", ge=2)
    labels: Literal["new", "own"] = param("new", "what classes are called: words drawn anew, or their own names")
    queries: int = param(4, "things that are asked for", ge=1)

    def check(self) -> None:
        found, words = len(labelled(self.things)), len(vocabulary()["words"])
        most = min(found, words) if self.labels == "new" else found
        if self.classes > most:
            raise SpecError(f"{self.name}: parameter 'classes' is {self.classes}; allowed: 2 to {most}")

    def stamp(self) -> dict[str, Any]:
        texts = [f"{label}: {', '.join(things)}" for label, things in labelled(self.things).items()]
        return {**super().stamp(), "text": fingerprint(texts)}

    @property
    def chance(self) -> float:
        return 1 / self.classes

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        chance = random.Random(f"{self.name} {self.version} {seed} {index}")
        held = labelled(self.things)
        own = chance.sample(sorted(held), self.classes)
        names = chance.sample(vocabulary()["words"], self.classes) if self.labels == "new" else own
        stock = {name: chance.sample(held[label], len(held[label])) for name, label in zip(names, own, strict=True)}
        asked = []
        for number in range(self.queries):
            name = chance.choice([name for name in names if len(stock[name]) > 1] or names)
            asked.append((stock[name].pop() if len(stock[name]) > 1 else stock[name][number % len(stock[name])], name))
        opening, _ = frame(tokenizer, "Each line gives a thing and its class.\n\n", "")
        ids, shots = token_ids(tokenizer, opening), 0
        for thing, name in self._lines(stock, chance):
            line = token_ids(tokenizer, f"{thing}: {name}\n")
            if len(ids) + len(line) > self.length:
                break
            ids, shots = ids + line, shots + 1
        if shots < 2 * self.classes:
            raise InputError(f"{self.name}: length {self.length} is too short; it holds {shots} lines")
        questions = [self._question(tokenizer, thing, names, names.index(name)) for thing, name in asked]
        about = {"shots": shots, "answer": [name for _, name in asked]}
        return Example(context=tuple(ids), questions=tuple(questions), about=about)

    def _lines(self, stock: dict[str, list[str]], chance: random.Random) -> Any:
        """Things and their classes without end, as many of each class."""
        left: dict[str, list[str]] = {name: [] for name in stock}
        while True:
            for name in chance.sample(list(stock), len(stock)):
                left[name] = left[name] or chance.sample(stock[name], len(stock[name]))
                yield left[name].pop(), name

    def _question(self, tokenizer: PreTrainedTokenizerBase, thing: str, names: list[str], right: int) -> Question:
        before = f"{frame(tokenizer, '', f'{chr(10)}What is the class of {thing}?')[1]}{thing}:"
        choices = tuple(tuple(continuation(tokenizer, before, f" {name}")) for name in names)
        return Question(ids=tuple(token_ids(tokenizer, before)), choices=choices, right=right)
