"""Sparse state expansion: a state of many partitions, of which a token touches few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import LinearLayer, LinearMixer, Memory
from vestige.layers.ops.recurrence import Drive, exact, recurrence
from vestige.layers.parts import GatedHeadNorm, join_heads, split_heads
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = ["SparseStateExpansion", "SparseStateExpansionLayer", "largest", "uneven"]

TEMPERATURE = 16.0
"""Divides the logarithm of the decay, as in gated linear attention."""


def largest(x: Float[Tensor, "... n"], count: int) -> Bool[Tensor, "... n"]:
    """Where the ``count`` largest stand."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(count, -1).indices, True)


def uneven(
    share: Float[Tensor, "batch length partitions"],
    touched: Int[Tensor, "batch length active"],
    valid: Bool[Tensor, "batch length"] | None,
) -> Float[Tensor, ""]:
    """How unevenly partitions are used: 1 where each is chosen as often as the next, more where few are.

    ``N / k`` times the sum over partitions of the mean share and of how often it is chosen.
    """
    real = torch.ones_like(share[..., 0]) if valid is None else valid.to(share)
    weight = real / real.sum().clamp_min(1)
    chosen = torch.zeros_like(share).scatter(-1, touched, 1.0)
    mean, often = (torch.einsum("bl,bln->n", weight, t) for t in (share, chosen))
    return share.shape[-1] / touched.shape[-1] * (mean * often).sum()


class _Urged(torch.autograd.Function):
    """The identity, which lets a further loss be differentiated together with whatever follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return slope, slope.new_ones(())


class _Moved(torch.autograd.Function):
    """Rows in another order; ``back`` is the way back, which slopes go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return slope.index_select(0, *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class _Parts:
    """What tokens write and read.

    Attributes:
        common, own: queries, keys, logarithms of decays, ``(batch, length, heads, keys)``, for the rows of all tokens
            and those of a partition.
        share: how much each partition is a token's; touched: those that it touches.
        v: values.
    """

    common: tuple[Tensor, Tensor, Tensor]
    own: tuple[Tensor, Tensor, Tensor]
    share: Float[Tensor, "batch length partitions"]
    touched: Int[Tensor, "batch length active"]
    v: Float[Tensor, "batch length heads values"]


class SparseStateExpansionLayer(LinearLayer):
    """The layer of :class:`SparseStateExpansion`.

    It holds ``S``, ``(batch, heads, (partitions + 1) * keys, values)``: the rows that every token writes to, then
    those of each partition.
    """

    mixer: SparseStateExpansion

    def __init__(self, mixer: SparseStateExpansion, place: Place) -> None:
        super().__init__(mixer, place)
        self.heads, keys, values = mixer.sizes(place)
        size, rank = place.hidden_size, mixer.rank
        self.scale = keys**-0.5
        self.q_proj = nn.Linear(size, self.heads * keys, bias=False)
        self.k_proj = nn.Linear(size, self.heads * keys, bias=False)
        self.v_proj = nn.Linear(size, self.heads * values, bias=False)
        self.q_change = _low_rank(size, rank, self.heads * keys, bias=False)
        self.k_change = _low_rank(size, rank, self.heads * keys, bias=False)
        self.decay = _low_rank(size, rank, self.heads * keys, bias=True)
        self.partition_decay = _low_rank(size, rank, self.heads * keys, bias=True)
        self.router = nn.Linear(size, mixer.partitions, bias=False)
        self.g_proj = _low_rank(size, values, self.heads * values, bias=False)
        self.norm = GatedHeadNorm(values, place.eps)
        self.o_proj = nn.Linear(self.heads * values, size, bias=False)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        if state is not None:
            return super().forward(x, layout, state)
        x = layout.blank(x)  # nobody wants to know what is held at the end, as in training
        return self.finish(self.apart(self.parts(x, layout), layout), x)

    def project(self, x: Tensor, layout: Layout, memory: Memory) -> Drive:
        parts = self.parts(x, layout)
        chosen = torch.zeros_like(parts.share, dtype=torch.bool).scatter(-1, parts.touched, True)
        weight = (parts.share * chosen)[:, :, None, :, None]  # (batch, length, 1, partitions, 1)
        (q, k, fade), own = parts.common, parts.own
        q, k = (
            torch.cat([first, (weight.to(each) * each[..., None, :]).flatten(-2)], -1)
            for first, each in ((q, own[0]), (k, own[1]))
        )
        touched = chosen[:, :, None, :, None] * own[2][..., None, :]
        return Drive(q, k, parts.v, torch.cat([fade, touched.flatten(-2)], -1), scale=self.scale, bounded=True)

    def parts(self, x: Tensor, layout: Layout) -> _Parts:
        """What tokens write and read."""
        q, k, v, fade = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.decay(x)
        common = self.rows(q, k, fade)
        own = self.rows(q + self.q_change(x), k + self.k_change(x), self.partition_decay(x))
        share, touched = self.route(x)
        if self.training and self.mixer.balance and torch.is_grad_enabled():
            v = _Urged.apply(v, self.mixer.balance * uneven(share, touched, layout.valid))
        # The largest tensors of the layer are in the type that the recurrence multiplies in.
        common, own = ((q.to(v.dtype), k.to(v.dtype), fade) for q, k, fade in (common, own))
        return _Parts(common, own, share, touched, F.silu(split_heads(v, self.heads)))

    def apart(self, parts: _Parts, layout: Layout) -> Float[Tensor, "batch length heads values"]:
        """What is read where nothing was held before: the tokens that touch a partition follow each other, as packed
        sequences do, so that none is multiplied by zeros."""
        drives = [
            Drive(q, k, parts.v, fade, scale=self.scale, bounded=True) for q, k, fade in (parts.common, parts.own)
        ]
        common, own = (drive.blanked(layout.valid) for drive in drives)
        chunk, active = self.mixer.chunk, self.mixer.active
        read, _ = recurrence(common, starts=layout.starts, cu_seqlens=layout.cu_seqlens, chunk=chunk)
        number = parts.touched * (1 + parts.v.shape[1])  # sequences of a partition, and of a packed text in it
        number = (number if layout.sequence is None else number + layout.sequence[..., None]).flatten(1)
        number, order = number.sort(dim=1, stable=True)
        starts = F.pad(number[:, 1:] != number[:, :-1], (1, 0), value=True)
        rows = (order + order.shape[1] * torch.arange(len(order), device=order.device)[:, None]).flatten()
        back = torch.empty_like(rows).scatter(0, rows, torch.arange(len(rows), device=rows.device))

        def beside(t: Tensor) -> Tensor:
            """Tokens of a partition beside each other."""
            each = t[:, :, None].expand(-1, -1, active, *t.shape[2:]).flatten(0, 2)
            return _Moved.apply(each, rows, back).unflatten(0, order.shape)  # type: ignore[no-any-return]

        assert own.decay is not None
        q, k, v, fade = (beside(t) for t in (own.q, own.k, own.v, own.decay))
        share = parts.share.gather(-1, parts.touched).flatten(1).gather(1, order)[..., None, None].to(q)
        sorted_drive = Drive(share * q, share * k, v, fade, scale=self.scale, bounded=True)
        found, _ = recurrence(sorted_drive, starts=starts, chunk=chunk)
        found = _Moved.apply(found.flatten(0, 1), back, rows)
        return read + found.unflatten(0, (*read.shape[:2], active)).sum(2)

    def rows(self, q: Tensor, k: Tensor, fade: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and logarithms of decays, by head; a token writes to the rows of its largest keys alone, and
        lets those alone fade."""
        q, k, fade = (split_heads(t.to(exact(t)), self.heads) for t in (q, k, fade))
        fade = F.logsigmoid(fade) / TEMPERATURE
        if self.mixer.rows is not None:
            written = largest(k, self.mixer.rows)
            k, fade = k.masked_fill(~written, -torch.inf), fade * written
        return F.silu(q), k.softmax(-1), fade

    def route(self, x: Tensor) -> tuple[Tensor, Int[Tensor, "batch length active"]]:
        """How much each partition is a token's, summing to one, and which of them it touches."""
        weight = self.router.weight.to(exact(x))
        share = F.linear(x.to(weight.dtype), weight).softmax(-1)
        return share, share.topk(self.mixer.active, -1).indices

    def finish(self, read: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(join_heads(self.norm(read, split_heads(self.g_proj(x), self.heads)).to(x.dtype)))


def _low_rank(size: int, rank: int, out: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, out, bias=bias))


class SparseStateExpansion(LinearMixer):
    """A state several times as large at nearly the same weights: each token writes to, lets fade and reads a few of
    its partitions, which a router chooses, and a part that all tokens share.

    The partitions have queries, keys and values in common; those of the chosen differ from the shared part's by a map
    of low rank. Sparse writing keeps what stands elsewhere from being blurred. While training, the router is urged to
    use all partitions by ``balance`` times a loss that is differentiated with the model's own, whatever that is.

    A head has one matrix with the rows of all partitions. In training tokens are sorted by the partitions that they
    touch, and none is multiplied by rows that it does not. A state that is carried on is brought up to date as a whole:
    there, what is not touched costs multiplications by zero.
    """

    name = "sparse-state-expansion"
    paper = Paper(
        title="Scaling Linear Attention with Sparse State Expansion",
        year=2025,
        arxiv="2507.16577",
        venue="ICLR 2026",
        code="https://github.com/BICLab/SpikingBrain2.0",
        equations="equation 7 (row-sparse update), and the expansion into partitions that follows, with decays of GLA",
    )
    verdict = Verdict(
        "reproduced",
        "Of 16 pairs 0.84 to 1.00 are recalled; by gated linear attention with keys of the same width 0.25 to 0.29 "
        "(3 seeds). Language modelling at scale was not looked at.",
    )
    forgets = "rows that a token touches fade at rates that it chooses; the others stand"
    layer = SparseStateExpansionLayer

    partitions: int = param(4, "of the state, beside the shared one", ge=2)
    active: int = param(1, "partitions that a token touches", ge=1)
    rows: int | None = param(None, "rows of a partition that a token writes to; default: all", ge=1)
    rank: int = param(16, "of the maps by which partitions differ, and of those from a token to its decays", ge=1)
    balance: float = param(0.01, "weight of the loss that evens out the use of partitions while training", ge=0)
    expand_k: float = param(0.5, "width of all keys of one partition over the hidden size", gt=0)
    expand_v: float = param(1.0, "width of all values over the hidden size", gt=0)

    def check(self) -> None:
        super().check()
        if self.active >= self.partitions:
            raise SpecError(
                f"{self.name}: parameter 'active' is {self.active}; allowed: fewer than partitions, {self.partitions}"
            )

    def sizes(self, place: Place) -> tuple[int, int, int]:
        """Heads, keys per head and partition, values per head."""
        heads = self.heads or place.heads
        keys = self.share(self.expand_k * place.hidden_size, heads, "expand_k * hidden_size")
        if self.rows is not None and self.rows > keys:
            raise SpecError(f"{self.name}: rows = {self.rows} is more than the {keys} rows of a partition's head")
        return heads, keys, self.share(self.expand_v * place.hidden_size, heads, "expand_v * hidden_size")

    def check_place(self, place: Place) -> None:
        self.sizes(place)
