"""StreamingLLM: the first tokens, which soak up attention, and the most recent ones."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vestige.context.layer import EMPTY, KeptLayer, Step
from vestige.context.policy import Evict
from vestige.context.slots import TurnedKeys
from vestige.core.method import Paper, Verdict, param

__all__ = ["StreamingLLM"]


class StreamingLLM(Evict):
    """Keep attention sinks and a rolling window of recent tokens.

    The first tokens of a text draw attention that has nowhere else to go; a plain window loses them and breaks.
    Kept beside the window, they let a model run on over unbounded text. No score is needed: an entry ranks by
    its position.

    Positions are counted inside the cache: the sinks stand right before the window, however much was dropped in
    between, so that no distance grows beyond the budget. With rotary positions only differences matter, so the window
    stays where it is and the keys of the sinks are turned on by the number of tokens missing. Sliding windows are
    counted so, too. Models with learned positions keep those of the text, which are in the embeddings.
    """

    name = "streaming-llm"
    paper = Paper(
        title="Efficient Streaming Language Models with Attention Sinks",
        year=2023,
        arxiv="2309.17453",
        venue="ICLR 2024",
        code="https://github.com/mit-han-lab/streaming-llm",
        equations="section 3.2, rolling cache with attention sinks",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, reading on through a cache of 40 entries: loss 0.18 nats above the whole cache's, without "
        "the sinks 1.3. A needle asked for after the cut is found where it stands in the window, and nowhere "
        "else",
    )

    sinks: int = param(4, "first tokens that are always kept", ge=0)
    recent: int | float = param(1.0, "last tokens kept: all that the sinks leave of the budget, or fewer", ge=0)
    reposition: bool = param(True, "count rotary positions inside the cache, as the paper does, not in the text")

    decode_rank: ClassVar[Literal["mass", "position", "none"]] = "position"

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override]
        return self.reposition and self.sinks > 0

    def score(self, entries: KeptLayer) -> Tensor:
        return entries._positions(entries.slots).float()

    def present(self, entries: KeptLayer, step: Step) -> None:
        """Turn the sinks on. Each time anew from the keys as they came, so that rounding does not add up."""
        rotary = entries.cache.rotary
        drops = step.allowed is not None and min(step.allowed) < entries.slots
        if rotary is None or (entries.slots == entries.seen and not drops):
            return
        known = f"sinks on {entries.device}"
        if known not in step.shared:
            rows, sinks, slots = self._sinks(entries)
            by = _missing(entries)
            by = by[rows, :, 0] if isinstance(by, Tensor) else by
            step.shared[known] = rows, sinks, slots, by, rotary.phase(by, entries.keys)
        rows, sinks, slots, by, phase = step.shared[known]
        came = self._came(entries, rows, sinks, slots, by)
        entries.keys[rows, :, slots] = rotary.apply(came[rows, :, sinks], phase)

    def turned(self, entries: KeptLayer) -> TurnedKeys | None:
        if entries.cache.rotary is None:
            return None
        rows, sinks, slots = self._sinks(entries)
        missing = torch.as_tensor(_missing(entries), device=entries.device).expand(entries.sizes[0], 1, 1)
        came = self._came(entries, rows, sinks, slots, missing[rows, :, 0])
        where = slots.new_zeros(entries.sizes[0], self.sinks).index_put((rows, sinks), slots)
        return TurnedKeys(came, where.int(), missing[:, 0, 0].int())

    def _came(self, entries: KeptLayer, rows: Tensor, sinks: Tensor, slots: Tensor, by: Any) -> Tensor:
        """The sinks' keys before any turn, ``(batch, kv_heads, sinks, dim)``."""
        keys = entries.keys[rows, :, slots]
        came = entries.aside.get("sinks")
        if came is None:
            came = entries.aside["sinks"] = keys.new_zeros(*entries.keys.shape[:2], self.sinks, keys.shape[-1])
            came[rows, :, sinks] = keys
        elif entries.cache.padded:  # a row that has lost nothing yet holds its sinks as they came, and may gain some
            came[rows, :, sinks] = torch.where(by[..., None] == 0, keys, came[rows, :, sinks])
        return came

    def places(self, entries: KeptLayer) -> Tensor:
        positions = entries._positions(entries.slots)
        if entries.cache.rotary is None:
            return positions
        return torch.where(positions < self.sinks, positions + _missing(entries), positions)

    def _sinks(self, entries: KeptLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Where the sinks are, the same in all heads and layers: for each its row, its position and its slot."""
        if not entries.cache.padded and isinstance(self.budget, int):  # they have never moved
            rows = torch.arange(entries.keys.shape[0], device=entries.device)
            sinks = torch.arange(self.sinks, device=entries.device)
            return rows.repeat_interleave(self.sinks), sinks.repeat(len(rows)), sinks.repeat(len(rows))
        positions = entries._positions(entries.slots)[:, 0]
        rows, slots = ((positions != EMPTY) & (positions < self.sinks)).nonzero(as_tuple=True)
        return rows, positions[rows, slots].long(), slots


def _missing(entries: KeptLayer) -> Any:
    """How many tokens each row has seen beyond those that it holds: one number, or ``(batch, 1, 1)``."""
    real = entries.cache.real
    if not entries.cache.padded:
        return real[0] - entries.slots
    held = (entries._positions(entries.slots)[:, :1] != EMPTY).sum(dim=2, keepdim=True)
    return torch.tensor(real, device=held.device)[:, None, None] - held
