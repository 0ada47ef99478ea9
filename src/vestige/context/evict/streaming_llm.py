"""StreamingLLM: the first tokens, which soak up attention, and the most recent ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from vestige.context.cache import KeptLayer
from vestige.context.policy import Evict
from vestige.core.method import Paper, param

__all__ = ["StreamingLLM"]


class StreamingLLM(Evict):
    """Keep attention sinks and a rolling window of recent tokens.

    The first tokens of a text draw attention that has nowhere else to go; a plain window loses them and breaks.
    Kept beside the window, they let a model run on over unbounded text. No score is needed: an entry ranks by
    its position.
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

    sinks: int = param(4, "first tokens that are always kept", ge=0)
    recent: int | float = param(1.0, "last tokens kept: all that the sinks leave of the budget, or fewer", ge=0)

    decode_rank: ClassVar[Literal["mass", "position", "none"]] = "position"

    def score(self, entries: KeptLayer) -> Tensor:
        return entries._positions(entries.slots).float()
