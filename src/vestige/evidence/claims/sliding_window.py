"""Claims of the sliding window: sharp and small, and blind further back."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.layers_model import state_after
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def as_sharp_as_softmax_within_its_window(case: LayerCase) -> Seen:
    """Pairs within the window are recalled as softmax attention recalls them; those further back are not."""
    within, beyond = PairRecall(pairs=4), PairRecall(pairs=4, noise=24)
    mixer = case.fitted.replace(window=within.length)
    near, far = case.recall(within, mixer), case.recall(beyond, mixer)
    softmax = case.recall(within, "softmax")
    seen = {"right answers within": near, "of softmax": softmax, "right answers with noise between": far}
    expect(min(near) > 0.97 * max(softmax), f"softmax attention is sharper: {seen}")
    expect(max(far) < min(near) - 0.3, f"it sees beyond its window: {seen}")
    return seen


@claim(slow=True)
def a_long_text_takes_no_more_bytes(case: LayerCase) -> Seen:
    """After 64 tokens it holds what it held after 16, and softmax attention four times what it held then."""
    held = {}
    for name, mixer in (("window", case.fitted), ("softmax", vestige.method("softmax"))):
        model = case.lm([{"mixer": mixer}])
        held[name] = [state_after(model, case.ids(1, length)).nbytes for length in (16, 64)]
    expect(held["window"][0] == held["window"][1], f"it grows: {held}")
    expect(held["softmax"][1] == 4 * held["softmax"][0] > 4 * held["window"][1], f"softmax takes no more: {held}")
    return held
