"""Claims of RazorAttention: heads found on random tokens are those that copy real text."""

from __future__ import annotations

from vestige.context.plan.windows import Table
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import copying_loss, planned
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

NARROW = {"sinks": 4, "recent": 60}  # for passages of 256 tokens


@claim(slow=True)
def the_heads_found_do_the_copying(case: CacheCase) -> Seen:
    """Text from far back is copied if the heads found keep everything, and is not if as many others do in their
    place."""
    plan = planned(case, **NARROW)
    mine = copying_loss(case, plan)
    others = copying_loss(case, plan.replace(induction=_negative(plan.induction), echo=_negative(plan.echo)))
    seen = {"loss": mine.tolist(), "with those that copy least": others.tolist()}
    expect(bool((mine + 0.5 < others).all()), f"other heads do as well: {seen}")
    return seen


def _negative(values: Table) -> Table:
    return tuple(tuple(-value for value in row) for row in values)
