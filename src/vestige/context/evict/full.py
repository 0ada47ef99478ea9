"""The whole cache, kept: the identity among policies, and the measure of all others."""

from __future__ import annotations

from vestige.context.policy import Evict
from vestige.core.method import Paper, Verdict, param

__all__ = ["Full"]


class Full(Evict):
    """Keep every entry: outputs are those of the model alone, bit for bit."""

    name = "full"
    paper = Paper(title="Attention Is All You Need", year=2017, arxiv="1706.03762", equations="eq. 1, cached")
    verdict = Verdict("reproduced", "the identity: tokens and logits equal the model's own")

    budget: float = param(1.0, "share of the tokens that is kept: all", ge=1, le=1)
    recent: int | float = param(0, "without meaning here: nothing is dropped", ge=0)
    lag: int = param(1, "without meaning here: nothing is dropped", ge=1)
