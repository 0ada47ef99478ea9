r"""The local linear estimate: a straight line fitted to the past around each query, in memory linear in the length.

With softmax shares :math:`p_j`, their mean key :math:`\bar k` and covariance :math:`C` of the keys, the intercept at
:math:`q` of the line that is fitted with weights :math:`p` and a ridge :math:`\lambda` on its slope is

.. math:: o = \sum_j p_j \big(1 - (k_j - \bar k) \cdot z\big) v_j, \qquad (C + \lambda I)\, z = \bar k - q .

That is the paper's estimate with its weighted sums centred: where the paper divides by a difference that can vanish,
nothing is divided here, the weights sum to one by themselves, and what the solver sees is as well conditioned as the
ridge makes it. It is solved by conjugate gradients, whose products with :math:`C` are two matrix products with the
keys; no covariance is ever stored. Gradients run through the solution by a second solve, not through the iterations.

Queries are worked on in blocks, and while training each block is worked out again in the backward pass: nothing of
the size of length by length is ever held.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vestige.layers.ops.recurrence import exact, has_kernels

__all__ = ["by_blocks", "local_linear_attention"]


def local_linear_attention(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch kv held dim"],
    value: Float[Tensor, "batch kv held width"],
    *,
    scaling: float,
    ridge: float,
    iterations: int = 64,
    valid: Bool[Tensor, "batch held"] | None = None,
    sequence: Int[Tensor, "batch held"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch heads length width"]:
    """The estimate of each query from the keys up to its own.

    The queries stand at the last ``length`` of the ``held`` keys; heads share keys in groups. All is computed in
    float32 at least; on CUDA, for bfloat16, sums are, and products are in its matrix units' form of it (11 bits).

    Args:
        scaling: of products of queries and keys, before the softmax.
        ridge: penalty of the slope, in units of the keys' variance; without bound it gives softmax attention.
        iterations: the most that the solver takes; it ends sooner where nothing changes any more. In exact arithmetic
            it needs no more than ``dim``.
        valid: keys that exist; a query always sees its own.
        sequence: number of the packed sequence of each key; none is seen from another.
        chunk: queries that are worked on together, by the portable form.
    """
    if has_kernels(query):
        from vestige.layers.ops.local_linear_triton import local_linear_cuda, serves

        if serves(query, value):
            return local_linear_cuda(
                query,
                key,
                value,
                scaling=scaling,
                ridge=ridge,
                iterations=iterations,
                valid=valid,
                sequence=sequence,
            )
    return by_blocks(
        query,
        key,
        value,
        scaling=scaling,
        ridge=ridge,
        iterations=iterations,
        valid=valid,
        sequence=sequence,
        chunk=chunk,
    )


def by_blocks(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch kv held dim"],
    value: Float[Tensor, "batch kv held width"],
    *,
    scaling: float,
    ridge: float,
    iterations: int = 64,
    valid: Bool[Tensor, "batch held"] | None = None,
    sequence: Int[Tensor, "batch held"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch heads length width"]:
    """The same on any device; arguments and result as :func:`local_linear_attention`."""
    kind = exact(query)
    heads, length = query.shape[1:3]
    kv_heads, held = key.shape[1], key.shape[2]
    past = held - length
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        k, v = key.to(kind), value.to(kind)
        for first in range(0, length, chunk):
            last = min(first + chunk, length)
            end = past + last
            q = query[:, :, first:last].to(kind).unflatten(1, (kv_heads, -1)).flatten(2, 3)
            place = (past + first, valid, sequence)
            arguments = (q, k[:, :, :end], v[:, :, :end], place, heads // kv_heads, scaling, ridge, iterations)
            if torch.is_grad_enabled() and length > chunk:
                out = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = _block(*arguments)
            outputs.append(out.unflatten(2, (-1, last - first)).flatten(1, 2))
    return torch.cat(outputs, 2).to(query.dtype)


def _hidden(
    end: int, device: torch.device, first: int, valid: Tensor | None, sequence: Tensor | None
) -> Bool[Tensor, "#batch rows end"]:
    """Which of the first keys are hidden from the queries that stand from ``first`` on."""
    row = torch.arange(first, end, device=device)[:, None]
    column = torch.arange(end, device=device)[None, :]
    hidden = (column > row)[None]
    if valid is not None:
        hidden = hidden | ~valid[:, None, :end]
    if sequence is not None:
        hidden = hidden | (sequence[:, first:end, None] != sequence[:, None, :end])
    return hidden & (row != column)


def _block(
    q: Float[Tensor, "batch kv rows dim"],
    k: Float[Tensor, "batch kv held dim"],
    v: Float[Tensor, "batch kv held width"],
    place: tuple[int, Tensor | None, Tensor | None],
    group: int,
    scaling: float,
    ridge: float,
    iterations: int,
) -> Float[Tensor, "batch kv rows width"]:
    """The estimates of some queries, those of a group behind one another; ``place`` is what :func:`_hidden` takes."""
    hidden = _hidden(k.shape[2], k.device, *place).repeat(1, group, 1)[:, None]
    p = (scaling * (q @ k.mT)).masked_fill(hidden, -torch.inf).softmax(-1)
    mean = p @ k
    z = _solve(p, k, mean, ridge, mean - q, iterations)
    return (p * (1 - _centred(k, mean, z))) @ v


def _centred(k: Tensor, mean: Tensor, z: Float[Tensor, "... rows dim"]) -> Float[Tensor, "... rows held"]:
    """``(k_j - mean) . z`` for every key."""
    return z @ k.mT - (z * mean).sum(-1, keepdim=True)


def _product(p: Tensor, k: Tensor, mean: Tensor, ridge: float, z: Tensor) -> Float[Tensor, "... rows dim"]:
    """``(C + ridge) z``, with the covariance of the keys under the shares ``p``."""
    weighted = p * _centred(k, mean, z)
    return weighted @ k - weighted.sum(-1, keepdim=True) * mean + ridge * z


def _solve(
    p: Float[Tensor, "... rows held"],
    k: Float[Tensor, "... held dim"],
    mean: Float[Tensor, "... rows dim"],
    ridge: float,
    due: Float[Tensor, "... rows dim"],
    iterations: int,
) -> Float[Tensor, "... rows dim"]:
    """``z`` with ``(C + ridge) z = due``, and its gradient.

    The solution is found without a graph. What is missing to ``due`` is then worked out with one: it is zero, and its
    gradient, solved for once more, is the solution's.
    """
    with torch.no_grad():
        z = _conjugate_gradients(p, k, mean, ridge, due, iterations)
    if not torch.is_grad_enabled():
        return z
    rest = due - _product(p, k, mean, ridge, z)
    return z + _Solved.apply(rest, p.detach(), k.detach(), mean.detach(), ridge, iterations)  # type: ignore[no-any-return]


class _Solved(torch.autograd.Function):
    """The solution for a right-hand side that is zero, of which only the gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, p: Tensor, k: Tensor, mean: Tensor, ridge: float, iterations: int) -> Tensor:
        ctx.save_for_backward(p, k, mean)
        ctx.ridge, ctx.iterations = ridge, iterations
        return torch.zeros_like(rest)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        p, k, mean = ctx.saved_tensors
        return _conjugate_gradients(p, k, mean, ctx.ridge, slope, ctx.iterations), None, None, None, None, None


def _conjugate_gradients(
    p: Tensor, k: Tensor, mean: Tensor, ridge: float, due: Tensor, iterations: int
) -> Float[Tensor, "... rows dim"]:
    """Every row on its own; rows that are done stand still."""
    z, rest, direction = torch.zeros_like(due), due, due
    size = rest.square().sum(-1, keepdim=True)
    enough = size * (8 * torch.finfo(due.dtype).eps) ** 2
    may_look = not torch.compiler.is_compiling() and not (due.is_cuda and torch.cuda.is_current_stream_capturing())
    for _ in range(iterations):
        working = size > enough
        if may_look and not bool(working.any()):
            break
        ahead = _product(p, k, mean, ridge, direction)
        step = torch.where(working, size / (direction * ahead).sum(-1, keepdim=True), 0)
        z, rest = z + step * direction, rest - step * ahead
        now = rest.square().sum(-1, keepdim=True)
        direction = torch.where(working, rest + now / size * direction, direction)
        size = torch.where(working, now, size)
    return z
