"""Claims of Atlas: steps as large in every direction."""

from __future__ import annotations

from vestige.evidence.certify.memorising import least_error, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@claim
def a_step_in_every_direction_tells_like_keys_apart(case: LayerCase) -> Seen:
    """Where all keys share a direction, Muon's steps leave less error than plain ones, each at the size that suits it
    best."""
    matrix = case.fitted.replace(conv=0, refresh=1, depth=1, residual=False, window=1, feature="none", degree=1, muon=5)

    def best(mixer: object, seed: int) -> float:
        keys, values = pairs(24, 16, seed)
        keys = keys + 2 * keys[:1]
        told = keys / keys.norm(dim=-1, keepdim=True), values
        return min(least_error(mixer, told, seed, (0.2,), times=2, step=step, momentum=0.5) for step in STEPS)

    mine, plain = ([best(mixer, seed) for seed in case.seeds] for mixer in (matrix, matrix.replace(muon=0)))
    seen = {"error": mine, "of plain steps": plain}
    expect(max(mine) < min(plain), f"plain steps do as well: {seen}")
    return seen
