"""Claims of OmegaNet: learning a window anew, and features of keys."""

from __future__ import annotations

from vestige.evidence.certify.memorising import least_error, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

RATES = (0.05, 0.1, 0.2, 0.4)


@claim
def a_window_is_better_than_the_newest_token(case: LayerCase) -> Seen:
    """Told pairs once, a matrix that learns the last eight at each token answers with less error than one that learns
    the newest alone, each at the rate that suits it best."""
    matrix = case.fitted.replace(conv=0, refresh=1, depth=1, residual=False, feature="none", degree=1)
    told = [pairs(24, 16, seed) for seed in case.seeds]
    mine, online = (
        [least_error(mixer, some, seed, RATES) for some, seed in zip(told, case.seeds, strict=True)]
        for mixer in (matrix.replace(window=8), matrix.replace(window=1))
    )
    seen = {"error": mine, "of the newest token alone": online}
    expect(all(a < b for a, b in zip(mine, online, strict=True)), f"the newest token is enough: {seen}")
    return seen


@claim
def features_make_room(case: LayerCase) -> Seen:
    """Of three times as many pairs as the head is wide, told six times over, a matrix on products of two channels
    answers with less error than one on the channels, each at the rate that suits it best."""
    products = case.fitted.replace(conv=0, refresh=1, depth=1, residual=False, window=1)
    told = [pairs(48, 16, seed) for seed in case.seeds]
    mine, plain = (
        [least_error(mixer, some, seed, RATES, times=6) for some, seed in zip(told, case.seeds, strict=True)]
        for mixer in (products, products.replace(feature="none", degree=1))
    )
    seen = {"error": mine, "on the channels": plain}
    expect(max(mine) < min(plain), f"the channels are enough: {seen}")
    return seen
