"""Claims of PyramidKV: a budget that falls from the lower layers to the upper ones loses less than an equal one."""

from __future__ import annotations

from vestige.context.evict.snapkv import SnapKV
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

WINDOW = 16  # queries that vote: the claims' budgets are small


@claim(slow=True)
def a_falling_budget_loses_less(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than under the same score with equal budgets."""
    score = SnapKV(window_size=WINDOW)
    mine, equal = read_on(case, case.on_lm(policy=score)), read_on(case, score)
    seen = {
        "divergence": mine.divergence.tolist(),
        "with equal budgets": equal.divergence.tolist(),
        "share of attention kept": mine.share.tolist(),
        "share with equal budgets": equal.share.tolist(),
    }
    expect(bool((mine.divergence < equal.divergence).all()), f"equal budgets do as well: {seen}")
    return seen
