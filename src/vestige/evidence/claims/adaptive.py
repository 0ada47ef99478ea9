"""Claims of adaptive budgets: parted by where the best entries are, the same total holds more of the attention."""

from __future__ import annotations

from vestige.context.evict.snapkv import SnapKV
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

WINDOW = 16  # queries that vote: the claims' budgets are small


@claim(slow=True)
def unequal_budgets_hold_more_attention(case: CacheCase) -> Seen:
    """Entries kept receive more of later tokens' attention than under the same score with equal budgets."""
    score = SnapKV(window_size=WINDOW)
    mine, equal = read_on(case, case.on_lm(policy=score)), read_on(case, score)
    seen = {
        "share of attention kept": mine.share.tolist(),
        "with equal budgets": equal.share.tolist(),
        "divergence": mine.divergence.tolist(),
        "divergence with equal budgets": equal.divergence.tolist(),
    }
    expect(bool((mine.share > equal.share).all()), f"equal budgets hold as much: {seen}")
    return seen
