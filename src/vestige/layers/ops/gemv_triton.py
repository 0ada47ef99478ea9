"""A matrix times one vector, at the speed at which the matrix can be read (CUDA).

Decoding one sequence multiplies every weight matrix with a single vector, which is all reading. A library's
matrix product leaves a fifth of the bandwidth unused there; this reads each row once, in long runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

__all__ = ["linear_of_one", "serves"]

ROWS, COLUMNS, WARPS = 2, 2048, 8


@triton.jit
def _gemv(vector, matrix, bias, out, rows, columns, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = matrix + at[:, None].to(tl.int64) * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        x = tl.load(vector + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            line + column[None, :],
            mask=(at < rows)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += w.to(tl.float32) * x[None, :]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=at < rows)


@torch.library.custom_op("vestige::linear_of_one", mutates_args=())
def linear_of_one(vector: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``vector (..., columns)``, one row in all, times ``matrix (rows, columns)`` transposed, plus ``bias (rows,)``."""
    rows, columns = matrix.shape
    out = vector.new_empty(*vector.shape[:-1], rows)
    _gemv[(triton.cdiv(rows, ROWS),)](
        vector.contiguous(),
        matrix,
        vector if bias is None else bias,
        out,
        rows,
        columns,
        HAS_BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out


@linear_of_one.register_fake
def _(vector: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return vector.new_empty(*vector.shape[:-1], matrix.shape[0])


def serves(module: nn.Module) -> bool:
    """Whether a module is a plain linear map that the kernel can stand in for."""
    return (
        type(module) is nn.Linear
        and module.weight.is_cuda
        and module.weight.is_contiguous()
        and module.weight.dtype in (torch.bfloat16, torch.float16)
    )
