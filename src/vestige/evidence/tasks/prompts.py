"""Writing prompts in a model's tokens: what the context tasks share.

A context is filled up with sentences to an exact number of tokens, so that prompts of one length make a batch
without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["INTRODUCTION", "continuation", "fill", "frame", "split", "token_ids"]

INTRODUCTION = "Here is a text. A question about it follows.\n\n"


def frame(tokenizer: PreTrainedTokenizerBase, introduction: str, question: str) -> tuple[str, str]:
    """What stands before the context's text, and what stands after it up to the answer.

    A chat turn where the tokenizer has a chat template, else plain text.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": f"{introduction}{mark}{question}"}]
        whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        opening, found, closing = whole.partition(mark)
        if found:
            return opening.rstrip(" "), closing
    return f"{start(tokenizer)}{introduction}", f"{question}\n"


def start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which this tokenizer begins a text of its own accord, if it does."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins else ""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's tokens alone."""
    return tokenizer(text, add_special_tokens=False).input_ids


def continuation(tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> list[int]:
    """Tokens of ``after`` where it follows ``before``; on its own where the two melt together."""
    head, whole = token_ids(tokenizer, before), token_ids(tokenizer, before + after)
    return whole[len(head) :] if whole[: len(head)] == head else token_ids(tokenizer, after)


def fill(tokenizer: PreTrainedTokenizerBase, source: Iterator[str], room: int) -> list[list[int]]:
    """Sentences of ``room`` tokens together; the first is cut at its beginning to fit, as in an excerpt."""
    filler: list[list[int]] = []
    missing = room
    while missing > 0:
        texts = [f" {next(source)}" for _ in range(max(4, missing // 24))]
        for ids in tokenizer(texts, add_special_tokens=False).input_ids:
            if missing > 0:
                filler.append(ids)
                missing -= len(ids)
    if missing < 0:
        filler.insert(0, filler.pop()[-missing:])
    return filler


def split(filler: list[list[int]], depth: float) -> tuple[list[int], list[int]]:
    """The filler before and after the end of a sentence that is nearest to ``depth``."""
    ends = [0]
    for ids in filler:
        ends.append(ends[-1] + len(ids))
    wanted = depth * ends[-1]
    cut = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
    flat = [token for ids in filler for token in ids]
    return flat[: ends[cut]], flat[ends[cut] :]
