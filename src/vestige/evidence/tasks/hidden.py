"""Facts hidden in filler text: what the tasks that ask for them share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vestige.errors import InputError
from vestige.evidence.tasks.haystack import check_source, fingerprint, sentences
from vestige.evidence.tasks.prompts import fill, token_ids
from vestige.evidence.tasks.task import ContextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HiddenFacts"]


class HiddenFacts(ContextTask):
    """A task whose facts stand between the sentences of a filler text, which the parameter ``haystack`` names."""

    if TYPE_CHECKING:
        haystack: str

    def check(self) -> None:
        check_source(self.haystack)

    def stamp(self) -> dict[str, Any]:
        return {**super().stamp(), "text": fingerprint(self.haystack)}

    def hide(
        self, tokenizer: PreTrainedTokenizerBase, opening: str, facts: Sequence[str], chance: random.Random
    ) -> tuple[int, ...]:
        """A context of exactly ``length`` tokens: the opening, and sentences with the facts between them, in order.

        Raises:
            InputError: ``length`` cannot hold the opening and the facts.
        """
        seed = chance.getrandbits(32)
        head, said = token_ids(tokenizer, opening), [token_ids(tokenizer, f" {fact}") for fact in facts]
        room = self.length - len(head) - sum(map(len, said))
        if room < 0:
            least = self.length - room
            raise InputError(f"{self.name}: length {self.length} is too short; this model needs at least {least}")
        filler = fill(tokenizer, sentences(self.haystack, seed), room)
        places = sorted(chance.randint(0, len(filler)) for _ in said)
        for place, ids in reversed(list(zip(places, said, strict=True))):
            filler.insert(place, ids)
        return (*head, *(token for ids in filler for token in ids))
