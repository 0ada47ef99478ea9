"""Old keys and values in few bits, beside a window of recent ones at full width."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vestige.context.policy import CachePolicy
from vestige.context.thin.compact import CompactLayer, Form, Thin
from vestige.core.method import Paper, Verdict, param

__all__ = ["QuantisedCache", "dequantise", "quantise"]


class QuantisedCache(Thin):
    r"""Round old keys and values to a few bits, each entry by itself.

    The channels of a key or value are taken in groups, and those of a group written as

    .. math:: x \approx z + s\,c, \qquad z = \min x, \quad s = \frac{\max x - \min x}{2^b - 1}, \quad
              c = \operatorname{round}\frac{x - z}{s},

    with codes *c* of *b* bits, packed into bytes, and *z* and *s* in half precision. An entry is rounded once, when it
    leaves the window, and its codes stay with it.

    KIVI, and the quantised layers of transformers after it, group keys by channel over many tokens, which at two bits
    keeps more. But a token in such a group can then neither be dropped nor replaced without the others, and
    transformers' layers round the whole cache anew each time their window is full. Here entries can be dropped
    one by one, and at four bits the two are as good.
    """

    name = "quantised-cache"
    paper = Paper(
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        year=2024,
        arxiv="2402.02750",
        venue="ICML 2024",
        code="https://github.com/jy-yuan/KIVI",
        equations="section 3: asymmetric round-to-nearest in groups, by token, with a full-precision window",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2: 0.009 nats from the model's own predictions at 4 bits, where h2o with as many bytes is "
        "0.064 away; 3e-5 at 8 bits, 0.64 at 2",
    )

    bits: Literal[8, 4, 2] = param(4, "bits of a code")
    group: int = param(32, "channels that share a scale; the last group of a head may have fewer", ge=1)

    def lossless(self, tokens: int) -> CachePolicy | None:
        return None  # rounding always changes something

    def encode(self, layer: CompactLayer, keys: Tensor, values: Tensor) -> Form:
        form = {}
        for name, states in (("keys", keys), ("values", values)):
            form[name], form[f"{name} scale"] = quantise(states, self.bits, self.group)
        return form

    def decode(self, layer: CompactLayer, form: Form) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(layer.dtype, torch.float32)
        keys, values = (
            dequantise(form[name], form[f"{name} scale"], self.bits, self.group, window.shape[3], exact)
            for name, window in (("keys", layer.window_keys), ("values", layer.window_values))
        )
        return keys, values


def quantise(
    states: Float[Tensor, "... dim"], bits: int, group: int
) -> tuple[UInt8[Tensor, "... bytes"], Float[Tensor, "... groups 2"]]:
    """Codes, packed into bytes, and per group the smallest value and the step between codes."""
    parts = _grouped(states.to(torch.promote_types(states.dtype, torch.float32)), group)
    low, high = parts.amin(dim=-1), parts.amax(dim=-1)
    scale = torch.stack([low, (high - low) / (2**bits - 1)], dim=-1).to(torch.float16)
    zero, step = scale.to(parts.dtype).unbind(dim=-1)
    codes = ((parts - zero[..., None]) / step[..., None]).round().nan_to_num(0.0)
    flat = codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)[..., : states.shape[-1]]
    return _pack(flat, bits), scale


def dequantise(
    packed: UInt8[Tensor, "... bytes"],
    scale: Float[Tensor, "... groups 2"],
    bits: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
) -> Float[Tensor, "... dim"]:
    """The states that codes stand for."""
    zero, step = scale.to(dtype).unbind(dim=-1)
    parts = _grouped(_unpack(packed, bits, dim).to(dtype), group)
    return (zero[..., None] + step[..., None] * parts).flatten(-2)[..., :dim]


def _grouped(states: Tensor, group: int) -> Tensor:
    """``(..., groups, group)``; the last channel is repeated where a group lacks some, which changes no extreme."""
    lacking = -states.shape[-1] % group
    if lacking:
        states = torch.cat([states, states[..., -1:].expand(*states.shape[:-1], lacking)], dim=-1)
    return states.unflatten(-1, (-1, group))


def _pack(codes: UInt8[Tensor, "... dim"], bits: int) -> UInt8[Tensor, "... bytes"]:
    """Codes of less than a byte, side by side in bytes."""
    each = 8 // bits
    if each == 1:
        return codes
    parts = _grouped(codes, each)
    packed = torch.zeros_like(parts[..., 0])
    for number in range(each):
        packed |= parts[..., number] << bits * number
    return packed


def _unpack(packed: UInt8[Tensor, "... bytes"], bits: int, dim: int) -> UInt8[Tensor, "... dim"]:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :dim]
