"""One key, several values."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from vestige.core.spec import param
from vestige.evidence.tasks.haystack import GRAMMAR, vocabulary
from vestige.evidence.tasks.hidden import HiddenFacts
from vestige.evidence.tasks.needle import FORMS
from vestige.evidence.tasks.prompts import INTRODUCTION, continuation, frame, token_ids
from vestige.evidence.tasks.task import Example, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MultiValueNeedle"]


class MultiValueNeedle(HiddenFacts):
    """Find every value that a long text gives to one key.

    The values are asked for in the order of the text; the value of an example is the share of them that come out, each
    after the right ones before it. Source: the multi-value task of RULER (arXiv 2404.06654, section 3.1), which takes
    them in any order from what is generated.
    """

    name = "multi-value-needle"
    version = 1

    values: int = param(4, "values of the key", ge=2, le=20)
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")

    @property
    def chance(self) -> float:
        return FORMS["number"].guess

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        chance, form = random.Random(f"{self.name} {self.version} {seed} {index}"), FORMS["number"]
        key = chance.choice(vocabulary()["places"])
        values: dict[str, None] = {}
        while len(values) < self.values:
            values[form.draw(chance)] = None
        question = (
            f"\n\nAccording to the text, what are the {self.values} {form.secret}s for the {key}? "
            "Give them in the order of the text, separated by commas."
        )
        opening, closing = frame(tokenizer, INTRODUCTION, question)
        facts = [form.said.format(key=key) + form.hidden.format(answer=value) + form.end for value in values]
        context = self.hide(tokenizer, opening, facts, chance)
        said = f"{closing}The {form.secret}s for the {key} are"
        answer: list[int] = []
        parts: list[tuple[int, int]] = []
        for value in values:
            before = said + tokenizer.decode(answer)
            comma = continuation(tokenizer, before, ",") if answer else []
            drawn = continuation(tokenizer, before + ("," if answer else ""), f" {value}")
            parts.append((len(answer) + len(comma), len(answer) + len(comma) + len(drawn)))
            answer += [*comma, *drawn]
        asked = Question(ids=tuple(token_ids(tokenizer, said)), answer=tuple(answer), parts=tuple(parts))
        return Example(context=context, questions=(asked,), about={"answer": list(values)})
