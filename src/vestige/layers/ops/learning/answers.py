r"""What a layer of a memory answers to each slot's input with the weights at that slot, which are never made:

.. math:: f_t = e^{a_t} z_t A + r_t z_t S - \sum_i R_{ti} (z_t \cdot x_i)\, d_i .

Its derivative is written out, so that a backward pass takes one node and matrix products, not dozens of small steps.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["answer"]


class _Answer(torch.autograd.Function):
    """All with one leading dimension, of memories."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        total: Tensor,
        surprise: Tensor | None,
        inputs: Tensor,
        slope: Tensor,
        within: Tensor,
        into: Tensor,
        carry: Tensor | None,
    ) -> Tensor:
        found = torch.bmm(into * z, total)
        if surprise is not None and carry is not None:
            found = torch.baddbmm(found, carry * z, surprise)
        met = torch.bmm(z, inputs.mT)
        ctx.save_for_backward(z, total, surprise, inputs, slope, within, into, carry, met)
        return torch.baddbmm(found, met * within, slope, alpha=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        z, total, surprise, inputs, slope, within, into, carry, met = ctx.saved_tensors
        by_total = torch.bmm(g, total.mT)
        d_z, d_into = into * by_total, (z * by_total).sum(-1, keepdim=True)
        d_total = torch.bmm(z.mT, into * g)
        d_surprise = d_carry = None
        if surprise is not None:
            by_surprise = torch.bmm(g, surprise.mT)
            d_z, d_carry = torch.addcmul(d_z, carry, by_surprise), (z * by_surprise).sum(-1, keepdim=True)
            d_surprise = torch.bmm(z.mT, carry * g)
        less = torch.bmm(g, slope.mT)
        d_slope = torch.bmm((met * within).mT, g).neg_()
        d_within = (less * met).neg_()
        d_met = (less * within).neg_()
        d_z = torch.baddbmm(d_z, d_met, inputs)
        return d_z, d_total, d_surprise, torch.bmm(d_met.mT, z), d_slope, d_within, d_into, d_carry


def answer(
    z: Float[Tensor, "blocks memories slots inputs"],
    total: Float[Tensor, "blocks memories inputs outputs"],
    surprise: Float[Tensor, "blocks memories inputs outputs"] | None,
    inputs: Float[Tensor, "blocks memories rows inputs"],
    slope: Float[Tensor, "blocks memories rows outputs"],
    within: Float[Tensor, "blocks memories slots rows"],
    into: Float[Tensor, "blocks memories slots"],
    carry: Float[Tensor, "blocks memories slots"] | None,
) -> Float[Tensor, "blocks memories slots outputs"]:
    """The answers; without surprise, ``carry`` is ``None`` too."""
    parts = (z, total, surprise, inputs, slope, within)
    flat = [None if t is None else t.flatten(0, 1) for t in parts]
    gates = [None if t is None else t.flatten(0, 1).unsqueeze(-1) for t in (into, carry)]
    return _Answer.apply(*flat, *gates).unflatten(0, z.shape[:2])  # type: ignore[no-any-return]
