"""Text for training language models: files, a tokenizer made on the spot, blocks of equal length."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vestige.errors import InputError, ModelError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Blocks", "find_files", "make_tokenizer", "read_texts", "split", "tokens_of"]

END, PAD = "<|end|>", "<|pad|>"


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders (all ``*.txt`` below) and patterns with ``*`` name, in order, each once.

    Raises:
        InputError: one of them names no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        place = Path(pattern).expanduser()
        if place.is_dir():
            paths = sorted(place.rglob("*.txt"))
        else:
            paths = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]  # noqa: PTH207 (** and ~)
        files = [path for path in paths if path.is_file()]
        if not files:
            raise InputError(f"data names no file: {pattern!r}")
        found.update(dict.fromkeys(path.resolve() for path in files))
    return list(found)


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """Each file as text.

    Raises:
        InputError: a file that cannot be read as UTF-8.
    """
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as text: {error}") from error


def make_tokenizer(name: str, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    """A tokenizer.

    Args:
        name: ``"bytes"``: each byte a token; ``"bpe:4096"``: byte-level BPE of that many tokens, learnt from the files;
            else a folder or a Hugging Face id.

    Raises:
        SpecError: a vocabulary too small for bytes.
        ModelError: no such tokenizer.
    """
    kind, _, size = name.partition(":")
    if kind not in ("bytes", "bpe"):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(f"no tokenizer {name!r}: {str(error).splitlines()[0]}") from error
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(letters) + 2
    if kind == "bpe" and not (size.isdigit() and int(size) >= least):
        raise SpecError(f"tokenizer is {name!r}; allowed: bpe:N with N >= {least}")
    if kind == "bytes" and size:
        raise SpecError(f"tokenizer is {name!r}; allowed: bytes, without a number")
    if kind == "bytes":
        vocabulary = {token: n for n, token in enumerate([PAD, END, *letters])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    else:
        tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=int(size), special_tokens=[PAD, END], initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator(read_texts(files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=END)


def tokens_of(tokenizer: Any, files: Sequence[Path]) -> tuple[np.ndarray, int]:
    """All files as one row of token ids, the end token after each; and how many bytes they have."""
    pieces, size = [], 0
    for text in read_texts(files):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        pieces.append(np.asarray([*ids, *_end(tokenizer)], dtype=np.int32))
        size += len(text.encode())
    return np.concatenate(pieces), size


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def split(tokens: np.ndarray, length: int, held_out: float) -> tuple[Blocks, Blocks]:
    """Blocks to train on, and the last ones to look at the loss on.

    Raises:
        InputError: too little text for one block of each.
    """
    blocks = len(tokens) // length
    kept = max(1, round(blocks * held_out))
    if blocks < kept + 1:
        raise InputError(f"the text has {len(tokens)} tokens; two blocks of {length} are needed at least")
    cut = (blocks - kept) * length
    return Blocks(tokens[:cut], length), Blocks(tokens[cut : blocks * length], length)


class Blocks(Dataset[dict[str, Tensor]]):
    """A row of tokens, cut into blocks of equal length."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.tokens[index * self.length : (index + 1) * self.length]
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids}
