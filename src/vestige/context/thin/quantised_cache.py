"""Old keys and values in few bits, beside a window of recent ones at full width."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vestige.context.attention import Look
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
        "0.064 away; 3e-5 at 8 bits, 0.64 at 2. Every entry is there, so at 4 bits all needles in 512 tokens are "
        "found and 14 of 15 in 1,024; at 2 bits none and 1",
    )

    bits: Literal[8, 4, 2] = param(4, "bits of a code")
    group: int = param(32, "channels that share a scale; the last group of a head may have fewer", ge=1)

    def lossless(self, tokens: int) -> CachePolicy | None:
        return None  # rounding always changes something

    def encode(self, layer: CompactLayer, keys: Tensor, values: Tensor) -> Form:
        if keys.shape == values.shape:  # at once: with few entries it is the number of operations that counts
            codes, scales = quantise(torch.stack([keys, values]), self.bits, self.group)
        else:
            codes, scales = zip(*(quantise(states, self.bits, self.group) for states in (keys, values)), strict=True)
        return {"keys": codes[0], "keys scale": scales[0], "values": codes[1], "values scale": scales[1]}

    def decode(self, layer: CompactLayer, form: Form) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(layer.dtype, torch.float32)
        keys, values = (
            dequantise(form[name], form[f"{name} scale"], self.bits, self.group, window.shape[3], exact)
            for name, window in (("keys", layer.window_keys), ("values", layer.window_values))
        )
        return keys, values

    def read(self, layer: CompactLayer, look: Look, form: Form) -> tuple[tuple[Tensor, Codes], Codes]:
        dim = layer.window_keys.shape[3], layer.window_values.shape[3]
        keys, values = (
            Codes(form[name], form[f"{name} scale"], self.bits, self.group, width, layer.dtype)
            for name, width in zip(("keys", "values"), dim, strict=True)
        )
        return (look.query, keys), values


@dataclass(frozen=True)
class Codes:
    r"""Rounded states as one token's attention reads them: they are never widened.

    With *z*, *s* and *c* as above, and the channels *i* of a group *g*, a query meets a key, and weights *w* of the
    entries mix values, as

    .. math:: q \cdot k = \sum_g \Big( z_g \sum_{i \in g} q_i + s_g \sum_{i \in g} q_i c_i \Big), \qquad
              \sum_n w_n v_{n i} = \sum_n w_n z_{n g} + \sum_n (w_n s_{n g})\, c_{n i}.

    A code is read in its place in the byte, without a shift: as :math:`2^{bk} c`, in the order of the places.

    Attributes:
        packed: ``(batch, kv_heads, entries, bytes)``.
        scale: ``(batch, kv_heads, entries, groups, 2)``.
        dtype: of the model.
    """

    packed: UInt8[Tensor, "batch kv entries bytes"]
    scale: Float[Tensor, "batch kv entries groups 2"]
    bits: int
    group: int
    dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:3], self.dim)

    def meet(self, query: Float[Tensor, "batch kv rows dim"]) -> Float[Tensor, "batch kv rows entries"]:
        """Products of the keys with queries."""
        rows, (zero, step), places = query.to(self._exact), self._scale(), self._places()
        spread = (rows[..., None, places.channel] * places.weight).flatten(2, 3)
        dots = (spread @ self._raised().mT).unflatten(2, (rows.shape[2], -1))
        sums = rows @ places.member.mT
        return ((dots * step[:, :, None]).sum(dim=3) + sums @ zero).to(query.dtype)

    def mix(self, weights: Float[Tensor, "batch kv rows entries"]) -> Float[Tensor, "batch kv rows dim"]:
        """Mixtures of the values."""
        rows, (zero, step), places = weights.to(self._exact), self._scale(), self._places()
        scaled = (rows[..., None, :] * step[:, :, None]).flatten(2, 3)
        spread = (scaled @ self._raised()).unflatten(2, (rows.shape[2], -1))
        mixed = (spread * places.weight).sum(dim=3)[..., places.of_channel]
        return (mixed + (rows @ zero.mT) @ places.member).to(weights.dtype)

    @property
    def _exact(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Smallest values and steps, ``(batch, kv_heads, groups, entries)`` each."""
        zero, step = self.scale.to(self._exact).movedim(2, -1).unbind(dim=3)
        return zero, step

    def _raised(self) -> Float[Tensor, "batch kv entries places"]:
        """The codes, each times the power of two of its place."""
        each, width = 8 // self.bits, self.packed.shape[3]
        raised = torch.empty(*self.packed.shape[:3], each * width, dtype=self._exact, device=self.packed.device)
        for number in range(each):
            part = self.packed if each == 1 else self.packed & ((2**self.bits - 1) << self.bits * number)
            raised[..., number * width : (number + 1) * width] = part
        return raised

    def _places(self) -> Places:
        return Places.of(self.bits, self.group, self.dim, self._exact, self.packed.device)


@dataclass(frozen=True)
class Places:
    """Where the channels stand in :meth:`Codes._raised`.

    Attributes:
        channel: ``(places,)`` the channel at each place.
        of_channel: ``(dim,)`` the place of each channel.
        weight: ``(groups, places)`` what a raised code counts in its group; 0 in the others and where no channel is.
        member: ``(groups, dim)`` 1 for the channels of a group.
    """

    channel: Tensor
    of_channel: Tensor
    weight: Tensor
    member: Tensor

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(bits: int, group: int, dim: int, dtype: torch.dtype, device: torch.device) -> Places:
        each = 8 // bits
        width = -(-dim // each)
        with torch.inference_mode(False):  # they outlive the pass in which they are made
            number, byte = torch.arange(each)[:, None], torch.arange(width)
            channel = (byte * each + number).flatten()
            groups = torch.arange(-(-dim // group))[:, None]
            inside = (channel < dim) & (channel // group == groups)
            weight = inside / 2.0 ** (bits * number.expand(each, width).flatten())
            at = torch.arange(dim)
            member = (at // group == groups).to(dtype)
            tensors = (channel.clamp_max(dim - 1), at % each * width + at // each, weight.to(dtype), member)
            return Places(*(tensor.to(device) for tensor in tensors))


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
    packed = parts[..., 0]
    for number in range(1, each):
        packed = packed + parts[..., number] * 2 ** (bits * number)
    return packed


def _unpack(packed: UInt8[Tensor, "... bytes"], bits: int, dim: int) -> UInt8[Tensor, "... dim"]:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :dim]
