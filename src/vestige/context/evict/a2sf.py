"""A2SF: accumulated attention that forgets, so that old and new entries compete fairly."""

from __future__ import annotations

import math

from torch import Tensor

from vestige.context.policy import AttentionMass
from vestige.core.method import Paper, Verdict, param

__all__ = ["A2SF"]

NEGLIGIBLE = 1e-8  # share of the total weight that the queries beyond the horizon may have


class A2SF(AttentionMass):
    """Keep entries by attention accumulated with a forgetting factor.

    Under a causal mask an early entry gathers attention from more queries than a late one, so plain accumulation
    favours age. Each step multiplies what was gathered before by the factor *a*:

        A[n, j] = sum over i <= n of a^(n - i) * S[i, j],

    with *S* the attention weights summed over the query heads of a key-value head. With a factor of 1 it is H2O.
    """

    name = "a2sf"
    paper = Paper(
        title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
        year=2024,
        arxiv="2407.20485",
        code="https://github.com/Dirac-Notation/A2SF",
        equations="the accumulative score with forgetting factor (section 3)",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, 256 tokens cut to 40: what is kept gets 80% of the attention of later tokens, h2o's 75%; "
        "predictions are nearer the whole cache's in 7 of 8 passages (0.23 against 0.33 nats); where one "
        "hangs on an old token, h2o is ahead. A needle asked for only after the cut (512 tokens, half kept) "
        "is found only near the end: what nobody looks at is forgotten, and 39% of its tokens are held",
    )

    forgetting: float = param(0.98, "factor on the attention gathered before, per token; 1 forgets nothing", gt=0, le=1)

    def query_weights(self, age: Tensor) -> Tensor:
        return self.forgetting ** age.float()

    def carry(self, fresh: int) -> float:
        return self.forgetting**fresh

    def horizon(self) -> int | None:
        """Queries beyond this age weigh, all together, less than float32 can tell."""
        if self.forgetting == 1:
            return None
        return math.ceil(math.log(NEGLIGIBLE) / math.log(self.forgetting))
