"""Claims of DeepTransformers: features of the exponential are sharp."""

from __future__ import annotations

from vestige.evidence.certify.memorising import answers, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def the_exponentials_features_are_sharper_than_channels(case: LayerCase) -> Seen:
    """Of twice as many pairs as the head is wide, stored by Hebb's rule in a matrix, more are told apart by features to
    the third order than by the keys' channels, which is linear attention."""
    matrix = case.fitted.replace(conv=0, depth=1, residual=False, window=1, degree=3)

    def right(mixer: object, seed: int) -> float:
        keys, values = pairs(32, 16, seed)
        nearest = (answers(mixer, keys, values, seed, rate=5.0) @ values.T).argmax(1)
        return float((nearest == nearest.new_tensor(range(32))).double().mean())

    linear = matrix.replace(feature="none", degree=1)
    mine, plain = ([right(mixer, seed) for seed in case.seeds] for mixer in (matrix, linear))
    seen = {"told apart": mine, "by channels": plain}
    expect(min(mine) > max(plain), f"channels are as sharp: {seen}")
    return seen
