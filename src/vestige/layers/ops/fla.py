"""The recurrence by the kernels of flash-linear-attention, where they are installed and do it well.

One place decides whether they serve, and it decides from what is known beforehand: an error in the middle of a
backward pass would come too late. Where they do not, kernels of our own do, or
:func:`vestige.layers.ops.recurrence.chunked`.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vestige.layers.ops.drive import FAINTEST, Drive, per_token, serve

__all__ = ["HALF_PRECISION", "fla_recurrence", "prepared", "serves"]

HALF_PRECISION = (torch.float16, torch.bfloat16)

WIDEST_KEY = 256
# On Hopper, triton 3.4 and later compile some backward passes wrongly: with versions below the second, that of a scalar
# decay given per token, which the kernels refuse; and that of the delta rule before this version of the kernels.
WRONG_TRITON = ((3, 4, 0), (3, 7, 1))
SOUND_DELTA = (0, 5, 2)


def fla_recurrence(
    drive: Drive,
    state: Tensor | None,
    *,
    starts: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`vestige.layers.ops.recurrence.recurrence`; ``None`` where the kernels do not serve."""
    packed = starts is not None
    if not serves(drive) or (packed and (cu_seqlens is None or state is not None)):
        return None
    kernel, call = prepared(drive)
    out, state = kernel(**call, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens if packed else None)
    return out, state[-1:] if packed else state


def prepared(drive: Drive) -> tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Any]]:
    """The kernel for a drive that is served, and what it is given; nothing is copied that is as it has to be."""
    v = drive.v.contiguous()
    call: dict[str, Any] = {"q": _beside(drive.q, v), "k": _beside(drive.k, v), "v": v, "scale": drive.scale}
    decay = drive.decay
    if decay is not None:
        decay = _of_kind(decay, torch.float32)
        if not drive.bounded:
            decay = decay.clamp_min(FAINTEST)
    if drive.beta is None:
        if decay is not None and decay.dim() == 4:
            name, call["g"] = "gla.chunk_gla", decay.contiguous()
        else:
            name = "simple_gla.chunk_simple_gla"
            if _fixed(decay):
                call["g_gamma"] = decay
            elif decay is not None:
                call["g"] = per_token(decay, v).contiguous()
    else:
        name, call["beta"] = "delta_rule.chunk_delta_rule", _of_kind(drive.beta, v.dtype).contiguous()
        if decay is not None:
            name, call["g"] = "gated_delta_rule.chunk_gated_delta_rule", per_token(decay, v).contiguous()
    return _kernel(name), call


def _beside(tensor: Tensor, v: Tensor) -> Tensor:
    """Queries or keys in as many heads, and of the type, of the values."""
    return serve(_of_kind(tensor, v.dtype), v.shape[2], 2).contiguous()


def _of_kind(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """In a type. What is of it is left alone: PyTorch would take a microsecond to do nothing."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


def serves(drive: Drive) -> bool:
    """Whether the kernels take this: on CUDA, in half precision, and with a backward pass where one is due."""
    if not drive.v.is_cuda or drive.v.dtype not in HALF_PRECISION or not _installed():
        return False
    channelwise = drive.decay is not None and drive.decay.dim() == 4
    if drive.k.shape[-1] > WIDEST_KEY or (channelwise and drive.beta is not None):
        return False
    if (drive.k.shape[-1] % 2 or drive.v.shape[-1] % 2) and drive.differentiated:
        return False  # their backward pass wants even sizes
    return not (drive.differentiated and _wrong(drive))


def _fixed(decay: Tensor | None) -> bool:
    """Whether a decay is a constant per head, for which the kernels have a form of its own, without a gradient."""
    return decay is not None and decay.dim() == 1 and not decay.requires_grad


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("fla") is None:
        return False
    try:
        _kernel("gla.chunk_gla")
    except Exception as error:  # another version, a broken triton: our own path serves
        warnings.warn(f"flash-linear-attention is installed but does not load: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def _kernel(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    package, _, function = name.partition(".")
    return getattr(importlib.import_module(f"fla.ops.{package}"), function)


def _wrong(drive: Drive) -> bool:
    """Whether the backward pass would be refused, or be wrong."""
    lowest, beyond = WRONG_TRITON
    triton = _version("triton")
    if not _hopper(drive.v.device) or triton < lowest:
        return False
    scalar = drive.decay is not None and drive.decay.dim() < 4
    by_token = scalar and not (drive.beta is None and _fixed(drive.decay))
    return (by_token and triton < beyond) or (drive.beta is not None and _version("fla") < SOUND_DELTA)


@functools.cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _version(package: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(importlib.import_module(package).__version__).release
