"""What a memory's slopes through GELU and through a norm depend on, for CUDA: one Triton kernel each.

PyTorch makes some dozens of kernels of them. The mathematics stands where these are called, in ``perceptron.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["twice_gelu_cuda", "twice_norm_cuda"]

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


def twice_gelu_cuda(u: Tensor, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`~vestige.layers.ops.learning.perceptron.twice_gelu`."""
    u, slope, x = u.contiguous(), slope.contiguous(), x.contiguous()
    d_slope, d_x = torch.empty_like(slope), torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gelu[(triton.cdiv(x.numel(), BLOCK),)](u, slope, x, d_slope, d_x, x.numel(), BLOCK=BLOCK)
    return d_slope, d_x


def twice_norm_cuda(u: Tensor, slope: Tensor, h: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`~vestige.layers.ops.learning.perceptron.twice_norm`."""
    u, slope, h = u.contiguous(), slope.contiguous(), h.contiguous()
    d_slope, d_h = torch.empty_like(slope), torch.empty_like(h)
    dim, count = h.shape[-1], mean.numel()
    wide = triton.next_power_of_2(dim)
    rows = max(1, BLOCK // wide)
    with torch.cuda.device_of(h):
        _norm[(triton.cdiv(count, rows),)](
            u, slope, h, mean.contiguous(), inverse.contiguous(), d_slope, d_h, count, dim, ROWS=rows, DIM=wide
        )
    return d_slope, d_h
