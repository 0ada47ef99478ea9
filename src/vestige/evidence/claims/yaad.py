"""Claims of Yaad: what fits nothing spoils little."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.memorising import answers, error, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def wild_values_spoil_less(case: LayerCase) -> Seen:
    """Where every fourth value is twenty times too large, the others are answered with less error than by a memory
    that learns from squares, each at the rate that suits it best."""
    matrix = {"conv": 0, "refresh": 1, "depth": 1, "residual": False}

    def best(mixer: object, rates: tuple[float, ...], seed: int) -> float:
        keys, values = pairs(12, 16, seed)
        told = values.clone()
        told[::4] *= 20
        sound = [n for n in range(12) if n % 4]
        told, twice = told.repeat(4, 1), keys.repeat(4, 1)
        found = [answers(mixer, twice, told, seed, asked=keys, rate=rate, bound=0.3) for rate in rates]
        return min(error(f[sound], values[sound]) for f in found)

    squares = vestige.method("miras", loss="l2", **matrix)
    mine = [best(case.fitted.replace(**matrix), (0.5, 1.0, 2.0), seed) for seed in case.seeds]
    plain = [best(squares, (0.005, 0.02, 0.05, 0.1, 0.2), seed) for seed in case.seeds]
    seen = {"error": mine, "learning from squares": plain}
    expect(max(mine) < min(plain), f"squares do as well: {seen}")
    return seen
