"""Where the tokens of one forward pass stand: what every mixer is told about them, and nothing more."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.errors import InputError

__all__ = ["Layout"]


class Layout:
    """Positions, padding and boundaries of the tokens that a layer is given.

    Padding stands before the first token of a row (or after its last, where no state is carried on).

    Attributes:
        positions: ``(batch, length)`` place of each token in its own text.
        past: tokens per row, padding included, that earlier passes left in the state.
        valid: ``(batch, length)``, False at padding; ``None`` where there is none.
        held: ``(batch, past + length)``, the same with the tokens of earlier passes.
        starts: ``(batch, length)``, True where a packed sequence begins; ``None`` where a row is one sequence.
        cu_seqlens: the boundaries of the packed sequences, for kernels: 0, ends.
        mask: what softmax attention over the whole past is given: as the attention implementation wants it.
        implementation: the attention implementation, a name that ``transformers.AttentionInterface`` knows.
        options: what else that implementation is given.
    """

    def __init__(
        self,
        positions: Int[Tensor, "batch length"],
        *,
        past: int = 0,
        held: Bool[Tensor, "batch all"] | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
        cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
        mask: Any = None,
        implementation: str = "sdpa",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.positions, self.past, self.held = positions, past, held
        self.valid = None if held is None else held[:, -positions.shape[1] :]
        self.starts, self.cu_seqlens = starts, cu_seqlens
        self.mask, self.implementation, self.options = mask, implementation, options or {}
        self._angles: dict[tuple[int, float, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._elsewhere: dict[torch.device, Self] = {}

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        past: int = 0,
        held: Bool[Tensor, "batch all"] | None = None,
        cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    ) -> Layout:
        """The layout of tokens given to a layer by hand, outside of a model.

        Raises:
            InputError: a mask of another size, or with padding between tokens; boundaries that do not fit.
        """
        if held is not None and held.shape != (batch, past + length):
            raise InputError(f"held is {tuple(held.shape)}; {(batch, past + length)} is due (batch, past + length)")
        positions = torch.arange(past, past + length, device=device).expand(batch, length)
        if held is not None:
            check_padding(held)
            positions = (held.cumsum(1) - 1).clamp_min(0)[:, -length:]
        starts = None
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, batch, length, past)
            starts = starts_of(cu_seqlens, length)
            positions = positions_of(starts)
        layout = cls(positions, past=past, held=held, starts=starts, cu_seqlens=cu_seqlens)
        layout.mask = layout.causal_mask()
        return layout

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same on a device: what Accelerate asks for where a model's blocks stand on several."""
        there = torch.empty(0, device=device).device  # a number, or a name without one, as a device
        if there == self.positions.device:
            return self
        if there not in self._elsewhere:

            def moved(part: Any) -> Any:
                return part.to(there, non_blocking=non_blocking) if hasattr(part, "to") else part

            twin = copy.copy(self)
            twin._angles, twin._elsewhere = {}, {}
            for name in ("positions", "valid", "held", "starts", "cu_seqlens", "mask"):
                setattr(twin, name, moved(getattr(self, name)))
            twin.options = {name: moved(part) for name, part in self.options.items()}
            self._elsewhere[there] = twin
        return self._elsewhere[there]

    @property
    def sequence(self) -> Int[Tensor, "batch length"] | None:
        """The number of the packed sequence that a token is of; ``None`` where a row is one sequence."""
        return None if self.starts is None else self.starts.cumsum(1)

    def blank(self, tensor: Float[Tensor, "batch length ..."], value: float = 0.0) -> Float[Tensor, "batch length ..."]:
        """A tensor with a value put in at padding."""
        if self.valid is None:
            return tensor
        return tensor.masked_fill(~self.valid.view(*self.valid.shape, *[1] * (tensor.dim() - 2)), value)

    def causal_mask(self) -> Bool[Tensor, "batch 1 length all"] | None:
        """What each token may attend to: itself and what lies before it in its sequence; ``None`` where that is all."""
        length = self.positions.shape[1]
        if self.held is None and self.starts is None and (self.past == 0 or length == 1):
            return None
        device = self.positions.device
        query = torch.arange(self.past, self.past + length, device=device)[:, None]
        key = torch.arange(self.past + length, device=device)[None, :]
        seen = (key <= query)[None]
        if self.held is not None:
            seen = seen & self.held[:, None, :]
        if self.sequence is not None:
            seen = seen & (self.sequence[:, :, None] == self.sequence[:, None, :])
        return (seen | (key == query))[:, None]  # padding sees itself: a softmax over nothing is not a number

    def angles(
        self, dim: int, theta: float, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch length 1 half"], Float[Tensor, "batch length 1 half"]]:
        """Cosine and sine of the rotary positions, worked out once per pass."""
        key = (dim, theta, dtype)
        if key not in self._angles:
            speeds = theta ** -(torch.arange(0, dim, 2, device=self.positions.device, dtype=dtype) / dim)
            angle = self.positions[:, :, None, None].to(dtype) * speeds
            self._angles[key] = angle.cos(), angle.sin()
        return self._angles[key]


def starts_of(cu_seqlens: Int[Tensor, " sequences+1"], length: int) -> Bool[Tensor, "1 length"]:
    """Where packed sequences begin."""
    none = torch.zeros(length, dtype=torch.bool, device=cu_seqlens.device)
    return none.index_fill(0, cu_seqlens[:-1].long(), True)[None]


def positions_of(starts: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Positions that begin anew with every packed sequence."""
    place = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return place - torch.where(starts, place, 0).cummax(1).values


def check_padding(held: Bool[Tensor, "batch all"]) -> None:
    """Refuse padding between the tokens of a row: windows and short convolutions would count it.

    Raises:
        InputError: a row whose tokens begin a second time.
    """
    if torch.compiler.is_compiling():
        return
    runs = held[:, 0].long() + (held[:, 1:] & ~held[:, :-1]).sum(1)
    if int(runs.max()) > 1:
        raise InputError(
            f"the mask has padding between the tokens of row {int(runs.argmax())}; it may stand before the first, or "
            f"behind the last where nothing follows in a later pass"
        )


def check_boundaries(cu_seqlens: Int[Tensor, " sequences+1"], batch: int, length: int, past: int) -> None:
    """Refuse boundaries that are not those of packed sequences.

    Raises:
        InputError: more than one row, a past, boundaries that do not rise from 0 to the length.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise InputError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; a tensor is due: 0, and where each sequence ends"
        )
    if batch != 1 or past:
        raise InputError(f"packed sequences stand in one row without a past; here are {batch} rows, {past} tokens held")
    if torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or any(a >= b for a, b in pairwise(ends)):
        raise InputError(f"cu_seqlens is {ends}; it must rise from 0 to the number of tokens, {length}")
