"""Claims of Titans' memory: a network holds what a matrix cannot."""

from __future__ import annotations

from vestige.evidence.certify.memorising import least_error, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

RATES = (0.05, 0.1, 0.2)


@claim
def a_deep_memory_holds_more_than_a_matrix(case: LayerCase) -> Seen:
    """Of three times as many pairs as the head is wide, two layers answer with less error than one, each at the rate
    that suits it best."""
    deep = case.fitted.replace(conv=0, residual=False, expand=4)
    told = [pairs(48, 16, seed) for seed in case.seeds]
    mine, matrix = (
        [least_error(mixer, some, seed, RATES) for some, seed in zip(told, case.seeds, strict=True)]
        for mixer in (deep, deep.replace(depth=1))
    )
    seen = {"error": mine, "of a matrix": matrix}
    expect(max(mine) < min(matrix), f"a matrix does as well: {seen}")
    return seen
