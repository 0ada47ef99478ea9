"""Real text that every Python brings along: the language reference as ``pydoc`` shows it, half a megabyte of prose.

For checks that need long natural text and must not depend on a download. It is public, written by people, and long
enough that different seeds give different passages.
"""

from __future__ import annotations

import functools
import random
import re
from typing import TYPE_CHECKING, Any

from vestige.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["passages", "python_reference"]


@functools.cache
def python_reference() -> tuple[str, ...]:
    """The topics of the language reference, each as one text, the longest first; headings' underlines taken out."""
    from pydoc_data import topics

    texts = [re.sub(r"^[*=~\-\"^]{3,}\n", "", text, flags=re.MULTILINE) for text in topics.topics.values()]
    texts = [re.sub(r"[ \t]+", " ", re.sub(r"\n{2,}", "\n\n", text)).strip() for text in texts]
    return tuple(sorted(set(texts), key=lambda text: (-len(text), text)))


def passages(tokenizer: Any, length: int, seeds: tuple[int, ...]) -> Tensor:
    """Passages of natural text, one per seed, each starting at the beginning of a paragraph.

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

    rows = []
    for seed in seeds:
        chance = random.Random(f"passage {seed}")
        paragraphs = "\n\n".join(python_reference()).split("\n\n")
        start = chance.randrange(len(paragraphs))
        text = "\n\n".join(paragraphs[start:] + paragraphs[:start])
        # A token takes at least one character, and seldom more than eight: take enough, then cut.
        tokens = tokenizer(text[: 16 * length], add_special_tokens=False).input_ids[:length]
        if len(tokens) < length:
            raise InputError(f"the text has {len(tokens)} tokens; a passage of {length} was asked for")
        rows.append(torch.tensor(tokens))
    return torch.stack(rows)
