"""H2O: keep the entries that have received the most attention, and the recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.policy import AttentionMass
from vestige.core.method import Paper, Verdict

__all__ = ["H2O"]


class H2O(AttentionMass):
    """Keep heavy hitters: entries by attention accumulated over all queries, beside a recent window.

    The score of entry *j* after query *n* is the sum over queries *i* <= *n* of the attention weight of *i* on
    *j*, summed over the query heads that share the key-value head. Half of the budget is a recent window, as in
    the paper.
    """

    name = "h2o"
    paper = Paper(
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        year=2023,
        arxiv="2306.14048",
        venue="NeurIPS 2023",
        code="https://github.com/FMInference/H2O",
        equations="Definition 4.1 and Algorithm 1 (greedy eviction by accumulated attention)",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 256 tokens cut to 40: what is kept gets 75% of the attention of later tokens, sinks and "
        "window 60%; predictions are 0.23 nats from the whole cache's, those of a plain window 1.4. A needle "
        "asked for only after the cut (512 tokens, half kept) is found only near the end, where everything is"
        " kept: it has been looked at by few queries, and 31% of its tokens are held",
    )

    def query_weights(self, age: Tensor) -> Tensor:
        return torch.ones(age.shape, device=age.device)

    def carry(self, fresh: int) -> float:
        return 1.0
