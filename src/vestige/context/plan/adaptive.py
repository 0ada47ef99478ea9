"""Ada-KV: heads whose attention is spread widely get more."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.plan.sharing import Sharing, apportion
from vestige.context.policy import CachePolicy
from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError

__all__ = ["Adaptive"]


class Adaptive(Sharing):
    """Share a layer's budget out among its heads by where the best entries are.

    The entries of all heads are ranked together; a head's part is the number of its entries among the best
    *H b*, of *H* heads with *b* entries each (the first of each head among them). For attention weights that is the
    choice which loses the least weight. As scores only guess, part of the budget is shared out equally::

        b_h = (1 - safeguard) f_h + safeguard b

    rounded so that the heads together hold exactly *H b*. The heads part when a prompt is cut (and at each of its
    chunks); while decoding each keeps to its part, and what the budget grows by goes to all alike.

    Scores are compared as they are: attention means the same in every head, norms of keys less so.
    """

    name = "adaptive"
    paper = Paper(
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        year=2024,
        arxiv="2407.11550",
        venue="NeurIPS 2025",
        code="https://github.com/FFY0/AdaKV",
        equations="Algorithm 1 (budget allocation), with the safeguard of Algorithm 2; the score is that of `policy`",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 256 tokens cut to a mean of 40 with SnapKV's votes (window of 16): what is kept gets 74.0% "
        "of the attention of later tokens, with equal budgets 73.3%; 0.40 nats from the whole cache's "
        "predictions, with equal ones 0.42. A small gain, in each of three passages. A needle is found where "
        "equal budgets find it: the score decides, not how many each head may keep",
    )

    safeguard: float = param(0.2, "share of the budget that all heads get alike; 1 is a uniform budget", ge=0, le=1)

    def check(self) -> None:
        super().check()
        inner = type(self.policy)
        own = [
            hook
            for hook in ("new_layer", "present", "respond")
            if getattr(inner, hook) not in (getattr(CachePolicy, hook), getattr(Sharing, hook))
        ]
        if own:
            raise SpecError(
                f"{self.name}: parameter 'policy' is {self.policy.name}, which stores or reads entries in its own way; "
                "heads with budgets of their own need one that does not"
            )

        if not self._inner.comparable:
            raise SpecError(
                f"{self.name}: parameter 'policy' is {self.policy.name}, whose scores rank the entries of one head; "
                "those of different heads cannot be compared"
            )

    def share_out(self, rank: Tensor, budgets: list[int]) -> Tensor | None:
        heads, slots = rank.shape[1:]
        there = (rank > float("-inf")).sum(dim=2).tolist()
        rank = rank.scatter(2, rank.argmax(dim=2, keepdim=True), float("inf"))  # no head is left with nothing
        best = rank.flatten(1).argsort(dim=1, descending=True, stable=True) // slots
        shares = []
        for row, budget in enumerate(budgets):
            total = heads * budget
            if total >= sum(there[row]):
                shares.append([budget] * heads)
                continue
            among_best = best[row, :total].bincount(minlength=heads).tolist()
            wishes = [(1 - self.safeguard) * count + self.safeguard * budget for count in among_best]
            shares.append(apportion(wishes, total, most=there[row]))
        if all(len(set(row)) == 1 for row in shares):
            return None
        return torch.tensor(shares, device=rank.device)
