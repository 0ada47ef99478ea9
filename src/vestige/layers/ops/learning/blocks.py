"""Where tokens stand in blocks: a memory that learns looks at its errors anew only after so many tokens of a text.

Blocks are counted in real tokens of each text, so they begin elsewhere in every row that is padded, after a state that
ended within a block, and with each packed sequence. Tokens are moved to slots of blocks; slots may stay empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks:
    """The slots of a pass.

    Attributes:
        width: slots per block.
        count: blocks.
        before: tokens of the past that a block also looks at, which stand right before its first token.
        source: ``(batch, before + slots)`` what comes to each place: a token, nothing (``length``), or, counted from
            ``length + 1``, a token that is kept of the past; ``None``: the past, the tokens in their order, nothing.
        slot: ``(batch, length)`` where each token went; ``None``: where it stood.
        real: ``(batch, slots)`` whether there is a token.
        full: for each block whether it ends here, or in which rows.
        fresh: for each block whether nothing came before it; empty: no block but the first is so.
        filled: ``(batch,)`` tokens in the last block, if it did not end.
        last: ``(batch, before)`` places of the tokens to keep.
    """

    width: int
    count: int
    before: int
    source: Int[Tensor, "batch places"] | None
    slot: Int[Tensor, "batch length"] | None
    real: Bool[Tensor, "batch slots"]
    full: list[bool | Bool[Tensor, " batch"]]
    fresh: list[Bool[Tensor, " batch"]]
    filled: Int[Tensor, " batch"]
    last: Int[Tensor, "batch before"]

    @classmethod
    def of(
        cls,
        size: int,
        batch: int,
        length: int,
        *,
        device: torch.device,
        before: int = 0,
        filled: Int[Tensor, " batch"] | None = None,
        valid: Bool[Tensor, "batch length"] | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> Blocks:
        """Give every token its slot.

        Args:
            size: tokens per block.
            filled: tokens of the block that an earlier pass began; ``None``: no pass came before.
            valid: False at padding.
            starts: where packed sequences begin.
        """
        keep = torch.arange(before, device=device)
        if length == 1 and starts is None:
            real = torch.ones(batch, 1, dtype=torch.bool, device=device) if valid is None else valid
            held = real.new_zeros(batch, dtype=torch.long) if filled is None else filled
            held = held + real[:, 0]
            last = real.long() + keep
            return cls(1, 1, before, None, None, real, [held == size], [], held % size, last)
        if filled is None and valid is None and starts is None:
            count = -(-length // size)
            real = (torch.arange(count * size, device=device) < length).expand(batch, -1)
            full: list[bool | Tensor] = [(n + 1) * size <= length for n in range(count)]
            held = torch.full((batch,), length % size, device=device)
            return cls(size, count, before, None, None, real, full, [], held, (length + keep).expand(batch, -1))
        fresh: list[Tensor] = []
        begun = torch.zeros(batch, dtype=torch.long, device=device) if filled is None else filled
        if starts is None:
            exists = torch.ones(batch, length, dtype=torch.bool, device=device) if valid is None else valid
            slot = begun[:, None] + exists.cumsum(1) - 1
            count = -(-(length + (size - 1 if filled is not None else 0)) // size)
        else:
            exists = torch.ones_like(starts)
            place = torch.arange(length, device=device).expand_as(starts)
            place = (place - torch.where(starts, place, 0).cummax(1).values) % size
            block = (place == 0).cumsum(1) - 1
            slot = block * size + place
            count = int(block[:, -1].max()) + 1
            begins = torch.zeros(batch, count + 1, dtype=torch.bool, device=device)
            begins.scatter_(1, torch.where(starts, block, count), True)
            fresh = list(begins[:, :count].unbind(1))
        slots = count * size
        slot = torch.where(exists, slot, slots)
        source = torch.full((batch, before + slots + 1), length, device=device)
        if before and filled is not None:
            source.scatter_(1, begun[:, None] + keep, length + 1 + keep.expand(batch, -1))
        source.scatter_(1, before + slot, torch.arange(length, device=device).expand(batch, -1))
        source = source[:, :-1]
        real = source[:, before:] < length
        end = torch.where(exists, slot, -1).amax(1) + 1 if starts is not None else begun + exists.sum(1)
        edges = size * torch.arange(1, count + 1, device=device)
        full = list((edges <= end[:, None]).unbind(1))
        slot = slot.clamp_max(slots - 1)
        return cls(size, count, before, source, slot, real, full, fresh, end % size, end[:, None] + keep)

    def one(self, n: int) -> Blocks:
        """A block as a pass of its own, of tokens that were laid already; nothing before it is looked at."""
        real = self.real[:, n * self.width : (n + 1) * self.width]
        return Blocks(self.width, 1, 0, None, None, real, [self.full[n]], [], self.filled, self.last[:, :0])

    def lay(
        self, tensor: Float[Tensor, "batch length ..."], past: Float[Tensor, "batch before ..."] | None = None
    ) -> Float[Tensor, "batch places ..."]:
        """Tokens at their places, behind those kept of the past; zeros where there is nothing."""
        rest = tensor.shape[2:]
        missing = self.count * self.width - tensor.shape[1]
        if self.source is None and not self.before and not missing:
            return tensor
        past = tensor.new_zeros(tensor.shape[0], self.before, *rest) if past is None else past
        if self.source is None:
            return torch.cat([past, tensor, tensor.new_zeros(tensor.shape[0], missing, *rest)], 1)
        rows = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], 1, *rest), past], 1)
        return _pick(rows, self.source)

    def cut(self, places: Float[Tensor, "batch places heads dim"]) -> Float[Tensor, "count batch heads rows dim"]:
        """Blocks of places, each with the ``before`` places in front of it if these are there."""
        before = places.shape[1] - self.count * self.width
        return places.unfold(1, before + self.width, self.width).permute(1, 0, 2, 4, 3)

    def keep(self, places: Float[Tensor, "batch places ..."]) -> Float[Tensor, "batch before ..."]:
        """The tokens to keep."""
        return _pick(places, self.last)

    def back(self, slots: Float[Tensor, "batch slots heads dim"], length: int) -> Tensor:
        """What stands in slots, in the order of the tokens."""
        return slots[:, :length] if self.slot is None else _pick(slots, self.slot)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each batch entry."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)
