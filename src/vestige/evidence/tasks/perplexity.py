"""How well running text is foreseen from its past."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vestige.core.spec import param
from vestige.errors import InputError, SpecError
from vestige.evidence.data.text import fingerprint, passage, read_source, texts_of
from vestige.evidence.tasks.prompts import start, token_ids
from vestige.evidence.tasks.task import ContextTask, Example, Question, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vestige.evidence.tasks.asking import Heard

__all__ = ["Perplexity"]

_LEAD = 2  # tokens between the past and what is foreseen: the last ones that are known in any case


class Perplexity(ContextTask):
    """Foresee the next tokens of a long text from what is kept of its past.

    The value of an example is the perplexity of its continuation; :meth:`blind` gives that without the past, so the
    difference is what the past is worth. Texts are those of :data:`vestige.evidence.data.text.SOURCES`, or the
    user's own (:meth:`examples_of`). There is no constant chance level: guessing all tokens alike gives the number of
    tokens in the vocabulary.
    """

    name = "perplexity"
    version = 1
    metric = "perplexity"
    higher_is_better: ClassVar[bool] = False

    continuation: int = param(128, "tokens that are foreseen", ge=1)
    source: str = param(
        "python", "text: python, code, wordnet, moby-dick, sotu, 'file:PATH', or 'dataset:PATH' of a saved data set"
    )

    def check(self) -> None:
        read_source(self.source)

    def stamp(self) -> dict[str, Any]:
        return {**super().stamp(), "text": fingerprint(read_source(self.source))}

    @property
    def chance(self) -> None:
        return None

    def grade(self, question: Question, heard: Sequence[Heard]) -> float:
        return perplexity(heard[0].logprobs)

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        return self._cut(tokenizer, read_source(self.source), seed, index)

    def examples_of(
        self, texts: Iterable[str] | Any, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, count: int = 20
    ) -> tuple[Example, ...]:
        """Examples from texts at hand: strings, or a ``datasets.Dataset`` with the column ``text``.

        Raises:
            SpecError: ``count`` is not 1 or more.
            InputError: no text, or less of it than an example takes.
        """
        if type(count) is not int or count < 1:
            raise SpecError(f"{self.name}: parameter 'count' is {count!r}; allowed: int >= 1 (examples)")
        held = texts_of(texts)
        return tuple(self._cut(tokenizer, held, seed, index) for index in range(count))

    def _cut(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int, index: int) -> Example:
        head = token_ids(tokenizer, start(tokenizer))
        past = self.length - len(head)
        if past < 16:
            raise InputError(f"{self.name}: length {self.length} is too short; at least {16 + len(head)} are needed")
        ids = tuple(passage(tokenizer, texts, past + _LEAD + self.continuation, f"{seed} {index}"))
        question = Question(ids=ids[past : past + _LEAD], answer=ids[past + _LEAD :])
        return Example(context=(*head, *ids[:past]), questions=(question,), about={"source": self.source})
