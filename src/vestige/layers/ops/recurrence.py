r"""The recurrence that linear attention, gated linear attention, state-space models and the delta rule share.

A head holds a matrix :math:`S` of keys by values. Each token lets it decay, writes, and reads:

.. math::
    S_t = \operatorname{diag}(a_t) S_{t-1} + k_t v_t^\top, \qquad o_t = s\, S_t^\top q_t ,

or, by the delta rule, writes the difference to what it would have read (rate :math:`\beta_t`):

.. math::
    S_t = (I - \beta_t k_t k_t^\top) \operatorname{diag}(a_t) S_{t-1} + \beta_t k_t v_t^\top .

The decay :math:`a_t = e^{g_t}` is absent, fixed per head, or given per token as a scalar or per key channel.

Two forms of the same function: :func:`step` for one token, :func:`chunked` for many, which needs matrix products
only and loops over chunks, not tokens. Inside a chunk, with :math:`b` the running sum of :math:`g`,

.. math::
    O = s\,(Q e^{b} S_0 + A U), \quad A_{ij} = \sum_d q_{id} k_{jd} e^{b_{id} - b_{jd}} \; (i \ge j), \quad
    S_C = e^{b_C} S_0 + (K e^{b_C - b})^\top U ,

where :math:`U = V`, or for the delta rule (the WY form of a product of Householder-like factors)

.. math::
    (I + \operatorname{tril}(\beta A^{kk}, -1))\, U = \beta\,(V - K e^{b} S_0) .

Every exponent is a difference that is at most zero, so nothing overflows however strong the decay. All is worked
out in float32 at least, whatever the inputs and under autocast too, and differentiated by autograd.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.ops.drive import FAINTEST, Drive, per_token, serve
from vestige.layers.ops.fla import HALF_PRECISION, fla_recurrence

__all__ = ["FAINTEST", "Drive", "chunked", "exact", "has_kernels", "recurrence", "step"]

TRITON = importlib.util.find_spec("triton") is not None

MANY = 64
"""Heads of all rows that keep a GPU busy, where each walks from chunk to chunk: with so many our kernels train a decay
that is fixed per head in 0.75 to 0.91 of the other's time on an H100, with a quarter of them in 0.86 to 1.14."""


def exact(tensor: Tensor) -> torch.dtype:
    """The type that states and sums are kept in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels of our own can take a tensor: on CUDA where Triton is installed, but not in float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and TRITON


def recurrence(
    drive: Drive,
    state: Float[Tensor, "batch heads keys values"] | None = None,
    *,
    starts: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads values"], Float[Tensor, "batch heads keys values"]]:
    """Run the recurrence by the fastest form at hand: one step, the kernels of flash-linear-attention or our own, or
    chunks.

    Args:
        drive: see :class:`Drive`.
        state: what is held before the first token; zeros where ``None``.
        starts: tokens at which another packed sequence begins, with nothing held.
        cu_seqlens: the same as boundaries, for kernels.
        chunk: tokens per chunk, a power of two.

    Returns:
        What was read, in the values' type, and the state after the last token (in :func:`exact`'s type).
    """
    if drive.v.shape[1] == 1 and starts is None:
        token: dict[str, Any] = _token(drive)
        out, state = step(replace(drive, **token), state)
        return out[:, None], state
    found = None
    if drive.v.is_cuda and drive.v.dtype in HALF_PRECISION:
        kernels = _beside_the_compiler if torch.compiler.is_compiling() else _by_kernels
        found = kernels(drive, state, starts, cu_seqlens)
    return chunked(drive, state, starts=starts, chunk=chunk) if found is None else found


def _by_kernels(
    drive: Drive, state: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """By kernels that serve, those of flash-linear-attention first, but by ours where these are faster."""
    ours = drive.v.dtype == torch.bfloat16 and has_kernels(drive.v)
    found = None
    if not (ours and _ours_are_faster(drive)):
        found = fla_recurrence(drive, state, starts=starts, cu_seqlens=cu_seqlens)
    if found is not None or not ours:
        return found
    if drive.beta is None:
        from vestige.layers.ops.recurrence_triton import recurrence_cuda

        return recurrence_cuda(drive, state, starts)
    from vestige.layers.ops.delta_triton import delta_cuda, takes

    return delta_cuda(drive, state, starts) if takes(drive) else None


def _ours_are_faster(drive: Drive) -> bool:
    """Whether our kernels were seen to take less time than those of flash-linear-attention: for the delta rule without
    decay, and in training but for decays per token; with one fixed per head where there are many rows."""
    if drive.beta is not None:
        return drive.decay is None
    if not drive.differentiated:
        return False
    if drive.decay is None or drive.decay.dim() == 4:
        return True
    return drive.decay.dim() == 1 and drive.v.shape[0] * drive.v.shape[2] >= MANY


_beside_the_compiler = torch.compiler.disable(_by_kernels)  # which takes time at every call, so only where it is due


def step(
    drive: Drive, state: Float[Tensor, "batch heads keys values"] | None = None
) -> tuple[Float[Tensor, "batch heads values"], Float[Tensor, "batch heads keys values"]]:
    """One token: ``drive``'s tensors without the dimension of length."""
    kind = exact(drive.v)
    heads = drive.v.shape[1]
    with _no_autocast(drive.v):
        q, k = (serve(t, heads, 1).to(kind) for t in (drive.q, drive.k))
        u = drive.v.to(kind)
        if state is None:
            state = u.new_zeros(*k.shape, u.shape[-1])
        if drive.decay is not None:
            fade = drive.decay.to(kind).clamp_min(FAINTEST).exp()
            state = state * (fade[..., None] if fade.dim() == 3 else fade[..., None, None])
        if drive.beta is not None:
            u = drive.beta.to(kind)[..., None] * (u - torch.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., None] * u[..., None, :]
        out = drive.scale * torch.einsum("bhk,bhkv->bhv", q, state)
    return out.to(drive.v.dtype), state


def chunked(
    drive: Drive,
    state: Float[Tensor, "batch heads keys values"] | None = None,
    *,
    starts: Bool[Tensor, "batch length"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads values"], Float[Tensor, "batch heads keys values"]]:
    """Many tokens in chunks; arguments and results as :func:`recurrence`. Sizes inside: batch, head, chunk, token, dim.

    Memory: a state per chunk and one chunk-by-chunk matrix per chunk and head.
    """
    kind = exact(drive.v)
    batch, length, heads, values = drive.v.shape
    chunk = min(chunk, 1 << (length - 1).bit_length())
    with _no_autocast(drive.v):
        q, k, v = (_fold(serve(t, heads, 2).to(kind), chunk) for t in (drive.q, drive.k, drive.v))
        log_decay = None
        if drive.decay is not None:
            log_decay = per_token(drive.decay, drive.v).to(kind).clamp_min(FAINTEST)
            log_decay = _fold(log_decay if log_decay.dim() == 4 else log_decay[..., None], chunk).cumsum(-2)
        reach = _Reach.of(log_decay, None if starts is None else _fold(starts[:, :, None, None].to(kind), chunk))
        mixed = decayed_scores(q, k, log_decay) * reach.within
        entering, leaving = q * reach.into, k * reach.out
        seen = None
        if drive.beta is not None:
            beta = _fold(drive.beta.to(kind)[..., None], chunk)
            overlap = beta * decayed_scores(k, k, log_decay) * reach.within  # only what is below the diagonal counts
            solved = _inverse(overlap) * beta.mT
            v, seen = solved @ v, solved @ (k * reach.into)
        if state is None:
            state = v.new_zeros(batch, heads, k.shape[-1], values)
        before, written = [], []
        for n in range(v.shape[2]):
            before.append(state)
            u = v[:, :, n] if seen is None else v[:, :, n] - seen[:, :, n] @ state
            written.append(u)
            state = _faded(state, reach.across, n) + leaving[:, :, n].mT @ u
        u = v if seen is None else torch.stack(written, dim=2)
        out = drive.scale * (entering @ torch.stack(before, dim=2) + mixed @ u)
        out = out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(drive.v.dtype), state


def decayed_scores(
    q: Float[Tensor, "... chunk keys"],
    k: Float[Tensor, "... chunk keys"],
    log_decay: Float[Tensor, "... chunk channels"] | None,
) -> Float[Tensor, "... chunk chunk"]:
    """The lower triangle of products of queries and keys, each faded by the decay between the two tokens.

    Args:
        log_decay: running sum of the logarithm of the decay; one channel (a scalar decay) or one per key channel.
    """
    if log_decay is None:
        return (q @ k.mT).tril()
    if log_decay.shape[-1] == 1:
        gap = log_decay - log_decay.mT
        ahead = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
        return (q @ k.mT) * gap.masked_fill(ahead, -torch.inf).exp()
    return _scores_by_halves(q, k, log_decay)


def _scores_by_halves(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """With a decay per channel: blocks of twice the size, again and again.

    What the second half of a block reads of its first half is one matrix product, with the decay counted from
    the edge between them: both factors then shrink. On the diagonal nothing has faded.
    """
    length = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]
    size = 1
    while size < length:
        halves = (length // (2 * size), 2, size)
        (k1, _), (_, q2), (b1, b2) = (t.unflatten(-2, halves).unbind(-3) for t in (k, q, b))
        edge = b1[..., -1:, :]
        lower = (q2 * (b2 - edge).exp()) @ (k1 * (edge - b1).exp()).mT
        first, second = scores.unflatten(-3, halves[:2]).unbind(-3)
        upper = torch.cat([first, torch.zeros_like(lower)], -1)
        scores = torch.cat([upper, torch.cat([lower, second], -1)], -2)
        size *= 2
    return scores.squeeze(-3)


@dataclass(frozen=True)
class _Reach:
    """How much is left, between tokens of a chunk and across it: the decay, and zero over a packed sequence's edge.

    ``into``: at a token, of the state before the chunk; ``out``: of a token's write, at the chunk's end; ``across``:
    of the state before the chunk, at its end; ``within``: whether two tokens are of one sequence.
    """

    into: Any = 1.0
    out: Any = 1.0
    across: Any = None
    within: Any = 1.0

    @classmethod
    def of(cls, log_decay: Tensor | None, starts: Tensor | None) -> _Reach:
        into: Any = 1.0
        out: Any = 1.0
        across: Any = None
        within: Any = 1.0
        if log_decay is not None:
            into, out = log_decay.exp(), (log_decay[..., -1:, :] - log_decay).exp()
            across = into[..., -1, :]
        if starts is not None:
            sequence = starts.cumsum(-2)
            first = (sequence == 0).to(starts.dtype)
            into, out = into * first, out * (sequence == sequence[..., -1:, :])
            across = first[..., -1, :] if across is None else across * first[..., -1, :]
            within = sequence == sequence.mT
        return cls(into, out, across, within)


def _faded(state: Tensor, across: Tensor | None, n: int) -> Tensor:
    return state if across is None else state * across[:, :, n, :, None]


def _inverse(overlap: Tensor) -> Tensor:
    """The inverse of the identity plus the part of a matrix below the diagonal."""
    eye = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device).expand_as(overlap)
    return torch.linalg.solve_triangular(overlap, eye, upper=False, unitriangular=True)


def _token(drive: Drive) -> dict[str, Tensor | None]:
    """The drive's tensors at its only token."""
    decay = drive.decay if drive.decay is None else per_token(drive.decay, drive.v)[:, 0]
    beta = None if drive.beta is None else drive.beta[:, 0]
    return {"q": drive.q[:, 0], "k": drive.k[:, 0], "v": drive.v[:, 0], "decay": decay, "beta": beta}


def _fold(tensor: Tensor, chunk: int) -> Tensor:
    """``(batch, length, heads, dim)`` as ``(batch, heads, chunks, chunk, dim)``; the rest is filled up with zeros."""
    missing = -tensor.shape[1] % chunk
    tensor = F.pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
    return tensor.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
