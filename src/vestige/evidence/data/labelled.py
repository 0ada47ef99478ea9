"""Things and the classes that they belong to, without a network: what many-shot classification is made of."""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Iterable
from pathlib import Path

from vestige.core.haystack import vocabulary
from vestige.core.spec import did_you_mean
from vestige.errors import InputError, MissingPackageError, SpecError

__all__ = ["KINDS", "labelled"]

KINDS = {
    "town": "words of a country town: names, trades, places, things, colours",
    "elements": "chemical elements by their block; PyPI: mendeleev",
    "countries": "countries by their part of the world; PyPI: countryinfo",
    "wordnet": "nouns of WordNet by what they name; Debian: wordnet-base",
    "file:PATH": "a CSV file with the columns text and label",
}
_FEWEST = 4  # things that a class must have: one to be asked for, and a few to learn from
# Of WordNet's files of nouns those whose classes people agree on.
_NOUNS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "location", 18: "person", 20: "plant"}


def labelled(kind: str) -> dict[str, tuple[str, ...]]:
    """The things of each class, by one of the names in :data:`KINDS`; a thing has one class.

    Raises:
        SpecError: there is no such kind.
        MissingPackageError: its package is absent.
        InputError: fewer than two classes of four things.
    """
    if kind == "town":
        slots = {"name": "name", "trade": "trade", "place": "place", "thing": "thing", "colour": "colour"}
        pairs: Iterable[tuple[str, str]] = [(w, label) for slot, label in slots.items() for w in _slot(slot)]
    elif kind in ("elements", "countries"):
        from vestige.evidence.data.facts import countries, elements

        facts, field = (elements(), "block") if kind == "elements" else (countries(), "region")
        pairs = [(fact.subject, fact.answer) for fact in facts if fact.field == field]
    elif kind == "wordnet":
        pairs = _wordnet()
    elif kind.startswith("file:"):
        pairs = _csv(Path(kind.removeprefix("file:")).expanduser())
    else:
        raise SpecError(f"unknown kind of things {kind!r}; {did_you_mean(kind, KINDS)}")
    classes: dict[str, set[str]] = {}
    for thing, label in pairs:
        classes.setdefault(thing, set()).add(label)
    things: dict[str, list[str]] = {}
    for thing, labels in classes.items():
        if len(labels) == 1:
            things.setdefault(next(iter(labels)), []).append(thing)
    kept = {label: tuple(found) for label, found in things.items() if len(found) >= _FEWEST}
    if len(kept) < 2:
        raise InputError(f"{kind} has {len(kept)} classes of {_FEWEST} things or more; at least two are needed")
    return kept


def _slot(name: str) -> list[str]:
    return vocabulary()["slots"][name]


def noun_lines() -> list[str]:
    """The sets of synonyms of nouns, one a line, in WordNet's own form.

    Raises:
        MissingPackageError: ``wordnet-base`` is not installed.
    """
    folder = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))
    try:
        lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise MissingPackageError("wordnet-base", "nouns of WordNet", "apt-get install wordnet-base") from None
    return [line for line in lines if line[:1].isdigit()]  # the licence stands before the data, indented


@functools.cache
def _wordnet() -> list[tuple[str, str]]:
    """The first word of each set of synonyms, where it is one plain word."""
    pairs = []
    for line in noun_lines():
        _, file, _, _, word, *_ = line.split(" ", 5)
        if word.isalpha() and word.islower() and int(file) in _NOUNS:
            pairs.append((word, _NOUNS[int(file)]))
    return pairs


def _csv(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from None
    if not rows or not {"text", "label"} <= set(rows[0]):
        raise InputError(f"{path} needs the columns text and label, and rows below them")
    return [(row["text"].strip(), row["label"].strip()) for row in rows if row["text"] and row["label"]]
