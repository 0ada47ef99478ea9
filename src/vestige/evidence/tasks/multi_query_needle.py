"""Several keys, all of them asked for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from vestige.core.spec import param
from vestige.evidence.tasks.haystack import GRAMMAR, vocabulary
from vestige.evidence.tasks.hidden import HiddenFacts
from vestige.evidence.tasks.needle import FORMS, QUESTION
from vestige.evidence.tasks.prompts import INTRODUCTION, continuation, frame, token_ids
from vestige.evidence.tasks.task import Example, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MultiQueryNeedle"]


class MultiQueryNeedle(HiddenFacts):
    """Find several facts in one long text, each asked for by itself.

    Every question is put to a copy of the same cache, so what was kept must serve them all; the value of an example
    is the share that it answers. Source: the multi-query task of RULER (arXiv 2404.06654, section 3.1), which asks for
    all of them in one question.
    """

    name = "multi-query-needle"
    version = 1

    queries: int = param(4, "facts, all of which are asked for", ge=2, le=24)
    answer: Literal["number", "words"] = param("number", "five different digits, or four different words")
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")

    @property
    def chance(self) -> float:
        return FORMS[self.answer].guess

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        chance, form = random.Random(f"{self.name} {self.version} {seed} {index}"), FORMS[self.answer]
        answers = {key: form.draw(chance) for key in chance.sample(vocabulary()["places"], self.queries)}
        said = {key: form.said.format(key=key) for key in answers}
        hidden = {key: form.hidden.format(answer=answer) for key, answer in answers.items()}
        facts = [f"{said[key]}{hidden[key]}{form.end}" for key in answers]
        frames = {key: frame(tokenizer, INTRODUCTION, QUESTION.format(secret=form.secret, key=key)) for key in answers}
        opening = next(iter(frames.values()))[0]
        context = self.hide(tokenizer, opening, facts, chance)
        questions = [
            Question(
                ids=tuple(token_ids(tokenizer, f"{closing}{said[key]}")),
                answer=tuple(continuation(tokenizer, f"{closing}{said[key]}", hidden[key])),
            )
            for key, (_, closing) in frames.items()
        ]
        return Example(context=context, questions=tuple(questions), about={"answer": answers})
