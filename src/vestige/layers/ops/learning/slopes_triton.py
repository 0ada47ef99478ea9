r"""Slopes of a memory through GELU and through a norm, for CUDA, whose own derivatives are one Triton kernel each.

PyTorch makes some dozens of kernels of them. With :math:`n` the normalised channels, :math:`r` the inverse of their
deviation, :math:`\langle\cdot\rangle` a mean over channels and :math:`P(u) = u - \langle u \rangle - n \langle u n
\rangle`, the slope :math:`d = r P(g)` has, for a slope :math:`u` in it, the slopes

.. math::
    dg = r P(u), \qquad dh = r P(w) - \tfrac{r^2}{D} \Big(\sum u\,P(g)\Big) n, \qquad
    w = -r \big(u \langle g n \rangle + g \langle u n \rangle\big) .
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["through_gelu", "through_norm"]

BLOCK = 1024
ROOT_OF_HALF, DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu(u, slope, x, d_slope, d_x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    here = tl.load(x + at, mask=inside, other=0.0)
    given = tl.load(u + at, mask=inside, other=0.0)
    density = tl.exp(-0.5 * here * here) * DENSITY
    first = 0.5 * (1.0 + tl.erf(here * ROOT_OF_HALF)) + here * density
    tl.store(d_slope + at, given * first, mask=inside)
    second = density * (2.0 - here * here)
    tl.store(d_x + at, given * tl.load(slope + at, mask=inside, other=0.0) * second, mask=inside)


@triton.jit
def _across(x, normed, dim):
    """What is left of each row without its mean and without what lies along the normalised channels."""
    return x - (tl.sum(x, 1) / dim)[:, None] - normed * (tl.sum(x * normed, 1) / dim)[:, None]


@triton.jit
def _norm(u, slope, h, mean, inverse, d_slope, d_h, count, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    inside = (row < count)[:, None] & (dims < dim)[None, :]
    place = row[:, None].to(tl.int64) * dim + dims[None, :]
    middle = tl.load(mean + row, mask=row < count, other=0.0)[:, None]
    r = tl.load(inverse + row, mask=row < count, other=0.0)[:, None]
    given, g = tl.load(u + place, mask=inside, other=0.0), tl.load(slope + place, mask=inside, other=0.0)
    n = tl.where(inside, (tl.load(h + place, mask=inside, other=0.0) - middle) * r, 0.0)
    tl.store(d_slope + place, r * _across(given, n, dim), mask=inside)
    along, across = (tl.sum(g * n, 1) / dim)[:, None], (tl.sum(given * n, 1) / dim)[:, None]
    w = -r * (given * along + g * across)
    through = tl.sum(tl.where(inside, given * _across(g, n, dim), 0.0), 1)[:, None]
    tl.store(d_h + place, r * _across(w, n, dim) - r * r / dim * through * n, mask=inside)


class _ThroughGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor) -> Tensor:
        slope, x = slope.contiguous(), x.contiguous()
        ctx.save_for_backward(slope, x)
        return torch.ops.aten.gelu_backward(slope, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        slope, x = ctx.saved_tensors
        d_slope, d_x = torch.empty_like(slope), torch.empty_like(x)
        _gelu[(triton.cdiv(x.numel(), BLOCK),)](u.contiguous(), slope, x, d_slope, d_x, x.numel(), BLOCK=BLOCK)
        return d_slope, d_x


class _ThroughNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        slope, h = slope.contiguous(), h.contiguous()
        ctx.save_for_backward(slope, h, mean, inverse)
        which = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(slope, h, h.shape[-1:], mean, inverse, None, None, which)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:  # type: ignore[override]
        slope, h, mean, inverse = ctx.saved_tensors
        d_slope, d_h = torch.empty_like(slope), torch.empty_like(h)
        dim = h.shape[-1]
        wide = triton.next_power_of_2(dim)
        rows = max(1, BLOCK // wide)
        _norm[(triton.cdiv(mean.numel(), rows),)](
            u.contiguous(), slope, h, mean, inverse, d_slope, d_h, mean.numel(), dim, ROWS=rows, DIM=wide
        )
        return d_slope, d_h, None, None


def through_gelu(slope: Tensor, x: Tensor) -> Tensor:
    """The slope in what goes into GELU, from that in what comes out."""
    return _ThroughGelu.apply(slope, x)  # type: ignore[no-any-return]


def through_norm(slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The slope in what is normalised over its last dimension, from that in what comes out; ``mean`` and ``inverse``
    are of ``h``, and what runs through them is counted to it."""
    return _ThroughNorm.apply(slope, h, mean, inverse)  # type: ignore[no-any-return]
