r"""Answers of memories whose weights are no linear function of what is added up: they are worked out for each slot.

What is held of a layer at slot t is :math:`A_t = e^{a_t} A + r_t S - \sum_i R_{ti}\, x_i d_i^\top`, one product of the
slots' gates with A, S and all outer products. Some memories at a time, and again in the backward pass: nothing of that
size is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vestige.layers.ops.learning.answers import answer
from vestige.layers.ops.learning.retentions import SMALLEST, Retention

__all__ = ["answer_everywhere"]

AT_ONCE = {"cpu": 1 << 21}
"""Bytes of one such product: on a CPU what its cache holds, elsewhere 256 MB."""


def answer_everywhere(
    retention: Retention,
    z: Float[Tensor, "blocks memories slots inputs"],
    total: Float[Tensor, "blocks memories inputs outputs"],
    surprise: Float[Tensor, "blocks memories inputs outputs"] | None,
    inputs: Float[Tensor, "blocks memories rows inputs"],
    slope: Float[Tensor, "blocks memories rows outputs"],
    within: Float[Tensor, "blocks memories slots rows"],
    into: Float[Tensor, "blocks memories slots"],
    carry: Float[Tensor, "blocks memories slots"] | None,
) -> Float[Tensor, "blocks memories slots outputs"]:
    """As :func:`~vestige.layers.ops.learning.answers.answer`, with the weights that a retention makes of each slot's A.

    ``q-norm`` divides A by a power of its norm: only that needs every slot's A.
    """
    given = (total, surprise, inputs, slope, within, into, carry)
    flat = [None if t is None else t.flatten(0, 1) for t in (z, *given)]
    found = _Everywhere.apply(retention, *flat).unflatten(0, z.shape[:2])  # type: ignore[no-untyped-call]
    return answer(z, *given) * found if retention.name == "q-norm" else found


class _Everywhere(torch.autograd.Function):
    """All with one leading dimension, of memories: for ``kl`` the answers, for ``q-norm`` their factors."""

    @staticmethod
    def forward(ctx: Any, retention: Retention, *given: Tensor | None) -> Tensor:
        ctx.save_for_backward(*given)
        ctx.retention = retention
        room, found = _Room(), []
        for z, *part in _portions(given):
            gates, told, shape = _gates(*part[-3:]), _told(room, *part[:-3]), part[0].shape[1:]
            if retention.name == "kl":
                held = _held(room, gates, told, shape)
                found.append(_said(retention, z, torch.softmax(held, 2, out=room("weights", held.shape, held))))
            else:
                _, _, _, norm = _normed(room, retention.power, gates, told, part)
                found.append(retention.divided(norm))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        retention, room, found = ctx.retention, _Room(), []
        for asked, z, *part in _portions((g, *ctx.saved_tensors)):
            gates, told = _gates(*part[-3:]), _told(room, *part[:-3])
            if retention.name == "kl":
                held = _held(room, gates, told, part[0].shape[1:])
                weights = torch.softmax(held, 2, out=room("weights", held.shape, held))
                said = _said(retention, z, weights)
                d_z = retention.mass * (weights @ asked[..., None])[..., 0]
                torch.sub(retention.mass * z[..., None], said[..., None, :], out=held)
                d_held = held.mul_(weights).mul_(asked[..., None, :]).flatten(2)
            else:
                small, bent, largest, norm = _normed(room, retention.power, gates, told, part)
                d_z, power = torch.zeros_like(z), (norm / largest).pow(retention.power)
                d_norm = retention.divided_back(asked, norm) * norm / (power * largest)
                d_held = bent.mul_(small).mul_(d_norm)
            found.append((d_z, *_held_back(room, part, gates, told, d_held)))
        return None, *(None if t[0] is None else torch.cat(t) for t in zip(*found, strict=True))


class _Room:
    """Memory that is used again for the next memories."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, torch.Size], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key = name, torch.Size(shape)
        if key not in self.parts:
            self.parts[key] = like.new_empty(shape)
        return self.parts[key]


def _portions(given: Sequence[Tensor | None]) -> Iterator[list[Any]]:
    """Some memories at a time; of the tensors the one before the last but six is A."""
    total, into = given[-7], given[-2]
    assert total is not None and into is not None
    size = into.shape[1] * total[0].nbytes
    count = max(1, AT_ONCE.get(total.device.type, 1 << 28) // size)
    for first in range(0, len(total), count):
        yield [None if t is None else t[first : first + count] for t in given]


def _gates(within: Tensor, into: Tensor, carry: Tensor | None) -> Tensor:
    """What each slot makes of A, S and the rows' outer products: ``(memories, slots, parts)``."""
    return torch.cat([*(t[..., None] for t in (into, carry) if t is not None), -within], -1)


def _told(room: _Room, total: Tensor, surprise: Tensor | None, inputs: Tensor, slope: Tensor) -> Tensor:
    """These: ``(memories, parts, inputs x outputs)``."""
    first = [t for t in (total, surprise) if t is not None]
    told = room("told", (len(first) + inputs.shape[1], *total.shape), total)
    for place, part in enumerate(first):
        told[place] = part
    x, d = inputs.transpose(0, 1), slope.transpose(0, 1)
    torch.mul(x[..., None], d[..., None, :], out=told[len(first) :])
    return told.flatten(2).transpose(0, 1)


def _held(room: _Room, gates: Tensor, told: Tensor, shape: Sequence[int]) -> Tensor:
    """A of each slot: ``(memories, slots, inputs, outputs)``."""
    held = room("held", (*gates.shape[:2], told.shape[-1]), told)
    return torch.bmm(gates, told, out=held).unflatten(-1, shape)


def _normed(
    room: _Room, power: float, gates: Tensor, told: Tensor, given: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A of each slot over no less than its largest entry, so that powers do not overflow, the power less two of its
    size, ``(memories, slots, inputs x outputs)``; that entry; and the norm, ``(memories, slots, 1)``."""
    total, surprise, inputs, slope, *_ = given
    peaks = [t.abs().amax((-2, -1))[:, None] for t in (total, surprise) if t is not None]
    peaks.append(inputs.abs().amax(-1) * slope.abs().amax(-1))
    largest = (gates.abs() @ torch.cat(peaks, 1)[..., None]).clamp_min(SMALLEST)
    small = _held(room, gates / largest, told, total.shape[1:]).flatten(2)
    bent = room("bent", small.shape, small)
    if power == 4.0:  # products, for a general power takes ten times as long
        torch.mul(small, small, out=bent)
        summed = torch.linalg.vector_norm(bent, dim=-1, keepdim=True).square()
    else:
        torch.pow(small.abs().clamp_min(SMALLEST), power - 2, out=bent)
        summed = (bent * small.square()).sum(-1, keepdim=True)
    return small, bent, largest, largest * summed.pow(1 / power)


def _held_back(
    room: _Room, given: Sequence[Any], gates: Tensor, told: Tensor, d_held: Tensor
) -> tuple[Tensor | None, ...]:
    """Slopes in A, S, inputs and slopes of the rows, and in what each slot makes of them, from those in A of each
    slot."""
    total, _, inputs, slope, *_ = given
    kept = told.shape[1] - inputs.shape[1]
    d_gates = torch.bmm(d_held, told.mT)
    d_kept = torch.bmm(gates[..., :kept].mT, d_held).unflatten(-1, total.shape[1:])
    products = torch.bmm(gates[..., kept:].mT, d_held, out=room("products", (*inputs.shape[:2], told.shape[-1]), told))
    products = products.unflatten(-1, total.shape[1:])
    d_inputs = (products @ slope[..., None])[..., 0]
    d_slope = (inputs[..., None, :] @ products)[..., 0, :]
    d_surprise, d_carry = (d_kept[:, 1], d_gates[..., 1]) if kept > 1 else (None, None)
    return d_kept[:, 0], d_surprise, d_inputs, d_slope, -d_gates[..., kept:], d_gates[..., 0], d_carry


def _said(retention: Retention, z: Tensor, weights: Tensor) -> Tensor:
    """Answers by shares."""
    return retention.mass * (z[..., None, :] @ weights)[..., 0, :]
