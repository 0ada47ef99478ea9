"""The model on the bench: what tells it from others, and how long it takes."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, Any

from vestige.errors import SpecError

if TYPE_CHECKING:
    import torch

    from vestige.context.policy import CachePolicy

__all__ = ["WARM_UP", "device_name", "fingerprint", "given", "load_pair", "now", "time_policy"]

WARM_UP = 3  # decoded tokens that are not timed


def load_pair(model: Any, dtype: Any, device: Any) -> tuple[str, Any, Any]:
    """Name, model and tokenizer of what a user gave: a name, a folder, or a pair of model and tokenizer.

    Raises:
        SpecError: a tuple that is no pair.
        ModelError: the model cannot be loaded.
    """
    if isinstance(model, tuple):
        if len(model) != 2:
            raise SpecError(f"model is a tuple of {len(model)}; allowed: a name, a path, or (model, tokenizer)")
        network, tokenizer = model
        return str(getattr(network.config, "name_or_path", "") or type(network).__name__), network, tokenizer
    from vestige.models.hub import load

    return (os.fspath(model), *load(model, dtype=dtype, device=device))


def given(model: Any) -> dict[str, str]:
    """What every measurement of a model depends on, beside what is measured."""
    import vestige

    return {
        "vestige": vestige.__version__,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
    }


def fingerprint(network: Any) -> str:
    """What tells two models apart: names, shapes and a sample of the values of all weights, hashed."""
    import torch

    digest = hashlib.sha256()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            flat = weight.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 32)][:32].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def time_policy(model: Any, policy: CachePolicy, ids: torch.Tensor, tokens: int) -> tuple[float, list[float], int]:
    """Seconds of reading ``ids``, seconds of each of ``tokens`` decoded tokens, and the bytes held at the end.

    The policy works as a user would have it work: entries go while reading and while decoding.
    """
    import torch

    with policy.attach(model) as kept, torch.inference_mode():
        cache = kept.new_cache()
        began = now(model.device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(dim=-1)
        prefill = now(model.device) - began
        decode = []
        for _ in range(WARM_UP + tokens):
            began = now(model.device)
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(dim=-1)
            decode.append(now(model.device) - began)
        return prefill, decode[WARM_UP:], kept.nbytes


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """A device as rows name it: of a GPU its model."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
