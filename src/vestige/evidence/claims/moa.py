"""Claims of MoA: windows by influence keep far sight where it matters; equal windows of the same total lose it."""

from __future__ import annotations

from vestige.context.evict.full import Full
from vestige.context.plan.windows import Table
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import copying_loss, planned
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def unequal_windows_copy_from_afar(case: CacheCase) -> Seen:
    """At one density, text from far back is copied about as with the whole cache; with equal windows it is not."""
    plan = planned(case)
    mine, whole = copying_loss(case, plan), copying_loss(case, Full())
    equal = copying_loss(case, plan.replace(alpha=_all(plan.alpha, 0.0), beta=_all(plan.beta, plan.density)))
    seen = {"loss": mine.tolist(), "whole cache": whole.tolist(), "equal windows": equal.tolist()}
    expect(bool((mine < equal).all()), f"equal windows do as well: {seen}")
    expect(float((mine - whole).mean()) < 0.25 * float((equal - whole).mean()), f"much is lost: {seen}")
    return seen


def _all(values: Table, number: float) -> Table:
    return tuple(tuple(number for _ in row) for row in values)
