"""Claims of Memora: its weights stay shares."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.memorising import answers, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def no_value_makes_an_answer_large(case: LayerCase) -> Seen:
    """Told values a thousand times too large, it answers within its mass, where a memory whose weights only fade
    answers with a hundred times as much."""
    matrix = {"conv": 0, "refresh": 1, "depth": 1, "residual": False}

    def largest(mixer: object, seed: int) -> float:
        keys, values = pairs(16, 16, seed)
        return float(answers(mixer, keys, 1000 * values, seed).abs().max())

    mine = [largest(case.fitted.replace(**matrix), seed) for seed in case.seeds]
    plain = [largest(vestige.method("miras", **matrix), seed) for seed in case.seeds]
    seen = {"largest answer": mine, "of weights that fade": plain}
    expect(max(mine) <= case.fitted.mass and min(plain) > 100 * max(mine), f"it answers out of bounds: {seen}")
    return seen
