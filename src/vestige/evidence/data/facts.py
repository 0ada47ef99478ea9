"""Facts as questions and answers, each in two wordings: chemical elements and countries, without a network.

They are read from the files that the packages ``mendeleev`` and ``countryinfo`` hold; the packages are not run.
"""

from __future__ import annotations

import functools
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vestige.errors import MissingPackageError, ModelError

__all__ = ["Fact", "countries", "elements"]


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        subject: what it is about.
        field: which of its properties.
        question, paraphrase: two wordings.
        answer: the same to both.
    """

    subject: str
    field: str
    question: str
    paraphrase: str
    answer: str


# By field: the column, and two wordings.
_ELEMENTS = {
    "symbol": ("symbol", "What is the chemical symbol of {}?", "Which letters stand for {} in the periodic table?"),
    "number": ("atomic_number", "What is the atomic number of {}?", "How many protons has an atom of {}?"),
    "period": ("period", "In which period is {}?", "Which row of the periodic table holds {}?"),
    "block": ("block", "Which block does {} belong to?", "The outermost electrons of {} are in which kind of orbital?"),
}
_COUNTRIES = {
    "capital": ("capital", "What is the capital of {}?", "Which city does the government of {} sit in?"),
    "region": ("region", "Which part of the world is {} in?", "On which continent does {} lie?"),
}


@functools.cache
def elements() -> tuple[Fact, ...]:
    """Symbol, number, period and block of the chemical elements, by atomic number.

    Raises:
        MissingPackageError: ``mendeleev`` is not installed.
        ModelError: its data cannot be read.
    """
    place = _folder("mendeleev") / "elements.db"
    columns = ", ".join(column for column, _, _ in _ELEMENTS.values())
    try:
        with closing(sqlite3.connect(f"{place.as_uri()}?mode=ro", uri=True)) as base:
            rows = base.execute(f"select name, {columns} from elements order by atomic_number").fetchall()
    except sqlite3.Error as error:
        raise ModelError(f"the elements in {place} cannot be read: {error}") from error
    return tuple(
        Fact(str(name).lower(), field, first.format(str(name).lower()), second.format(str(name).lower()), str(value))
        for name, *values in rows
        for value, (field, (_, first, second)) in zip(values, _ELEMENTS.items(), strict=True)
        if value is not None
    )


@functools.cache
def countries() -> tuple[Fact, ...]:
    """Capital and region of the countries, by name.

    Raises:
        MissingPackageError: ``countryinfo`` is not installed.
        ModelError: its data cannot be read.
    """
    facts = []
    for path in sorted((_folder("countryinfo") / "data").glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        for field, (key, first, second) in _COUNTRIES.items():
            if held.get("name") and held.get(key):
                name = str(held["name"])
                facts.append(Fact(name, field, first.format(name), second.format(name), str(held[key])))
    return tuple(facts)


def _folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(package, "its facts", "pip install 'vestige[facts]'")
    return Path(found.submodule_search_locations[0])
