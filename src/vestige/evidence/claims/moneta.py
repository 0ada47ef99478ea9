"""Claims of Moneta: the largest errors go first."""

from __future__ import annotations

from vestige.evidence.certify.memorising import answers, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

RATES = (0.1, 0.2, 0.4, 0.8)


@claim
def the_largest_error_is_smaller(case: LayerCase) -> Seen:
    """Told pairs three times over, the largest error of any channel is smaller than with the square of the errors,
    each at the rate that suits it best."""
    cubes = case.fitted.replace(conv=0, refresh=1, depth=1, residual=False)

    def worst(mixer: object, seed: int) -> float:
        keys, values = pairs(16, 16, seed)
        told = keys.repeat(3, 1), values.repeat(3, 1)
        return min(float((answers(mixer, *told, seed, asked=keys, rate=r) - values).abs().max()) for r in RATES)

    mine, plain = ([worst(mixer, seed) for seed in case.seeds] for mixer in (cubes, cubes.replace(p=2.0)))
    seen = {"largest error": mine, "learning from squares": plain}
    expect(all(a < b for a, b in zip(mine, plain, strict=True)), f"squares do as well: {seen}")
    return seen
