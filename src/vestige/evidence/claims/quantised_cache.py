"""Claims of the quantised cache: to round all entries loses less than to drop as many bytes of them."""

from __future__ import annotations

from vestige.context.evict.h2o import H2O
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import READ, divergence
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def rounding_loses_less_than_dropping(case: CacheCase) -> Seen:
    """At four bits predictions are far nearer to the model's own than with as many bytes of entries dropped."""
    rounded = case.on_lm(bits=4)
    old = READ - rounded.full_width  # type: ignore[attr-defined]
    bits = 4 + 32 / rounded.group  # type: ignore[attr-defined]  # a group's two numbers of 16 bits are its own
    budget = READ - old + round(old * bits / 16)  # against entries of 16 bits
    mine, dropped = divergence(case, rounded), divergence(case, H2O(budget=budget))
    seen = {"divergence": mine.tolist(), f"h2o, {budget} of {READ} entries": dropped.tolist()}
    expect(bool((mine < dropped).all()), f"dropping does as well: {seen}")
    return seen


@claim(slow=True)
def fewer_bits_lose_more(case: CacheCase) -> Seen:
    """Eight bits lose next to nothing, four little, two much."""
    found = {bits: divergence(case, case.on_lm(bits=bits)) for bits in (8, 4, 2)}
    seen = {f"divergence at {bits} bits": each.tolist() for bits, each in found.items()}
    expect(bool((found[8] < found[4]).all() and (found[4] < found[2]).all()), f"bits do not matter: {seen}")
    expect(float(found[8].max()) < 1e-2, f"eight bits lose something: {seen}")
    return seen
