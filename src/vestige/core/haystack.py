"""Filler text for long prompts: endless, varied, the same for the same seed, and there without a network.

Two sources:

``"grammar"`` (the default)
    Short scenes of a country town, drawn from a seeded grammar: sentence frames whose slots hold people,
    trades, places, things, weather and reasons. One frame alone gives thousands of sentences, so no sentence
    is likely to come twice in a prompt. The text holds no digits and no codes, so whatever number a task
    hides in it stands there once.

``"file:PATH"``
    Sentences of a UTF-8 text file, in order, from a place that the seed chooses, going round at the end.

A haystack is a source, not a string: sentences are drawn until the prompt is long enough.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from vestige.errors import InputError, SpecError

__all__ = ["GRAMMAR", "check_source", "fingerprint", "sentences", "vocabulary"]

GRAMMAR = "grammar"
_FILE = "file:"
_FEWEST = 20  # sentences that a file must hold to be of use as filler


@functools.cache
def vocabulary() -> dict[str, Any]:
    """The word lists of the tasks: ``frames`` and ``slots`` of the grammar, ``places`` and ``words`` for facts."""
    import yaml

    return yaml.safe_load(resources.files(__package__).joinpath("words.yaml").read_text(encoding="utf-8"))


def check_source(source: str) -> None:
    """Check a haystack's source.

    Raises:
        SpecError: it is neither ``"grammar"`` nor ``"file:PATH"``.
        InputError: the file is absent, is no UTF-8 text, or holds too few sentences.
    """
    if source == GRAMMAR:
        return
    if not isinstance(source, str) or not source.startswith(_FILE):
        raise SpecError(f"haystack is {source!r}; allowed: 'grammar', or 'file:PATH' for a UTF-8 text file")
    _read(source)


def fingerprint(source: str) -> str:
    """What tells two haystack texts apart: the grammar's or the file's SHA-256, shortened."""
    content = json.dumps(vocabulary(), sort_keys=True) if source == GRAMMAR else "\n".join(_read(source))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def sentences(source: str = GRAMMAR, seed: int = 0) -> Iterator[str]:
    """An endless stream of sentences.

    Args:
        source: ``"grammar"``, or ``"file:PATH"``.
        seed: chooses the sentences, or the place in the file where reading starts.

    Raises:
        SpecError, InputError: see :func:`check_source`.
    """
    check_source(source)
    chance = random.Random(f"haystack {seed}")
    if source == GRAMMAR:
        return _compose(chance)
    lines = _read(source)
    return _go_round(lines, chance.randrange(len(lines)))


def _compose(chance: random.Random) -> Iterator[str]:
    """Sentences of the grammar; a frame comes again only after all others have come."""
    frames, slots = vocabulary()["frames"], vocabulary()["slots"]
    while True:
        for frame in chance.sample(frames, len(frames)):
            # A slot's second mention ("act2") is filled differently from its first.
            chosen = {slot: chance.sample(words, 2) for slot, words in slots.items()}
            filled = frame.format(**{k: v[0] for k, v in chosen.items()}, **{f"{k}2": v[1] for k, v in chosen.items()})
            filled = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)
            yield filled[0].upper() + filled[1:]


def _go_round(lines: list[str], start: int) -> Iterator[str]:
    while True:
        yield from lines[start:]
        start = 0


def _read(source: str) -> list[str]:
    path = Path(source.removeprefix(_FILE)).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"haystack {source!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"haystack {source!r} is no UTF-8 text") from None
    found = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text)]
    found = [s for s in found if s]
    if len(found) < _FEWEST:
        raise InputError(f"haystack {source!r} holds {len(found)} sentences; at least {_FEWEST} are needed")
    return found
