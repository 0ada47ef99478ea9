"""Claims of Aaren: a softmax over the whole past in a few numbers, asked by the layer and not by the token."""

from __future__ import annotations

from vestige.evidence.certify.layers_model import state_after
from vestige.evidence.certify.mixing import LayerCase, fitted
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall
from vestige.layers.mixers.sliding_window import SlidingWindow


@claim(slow=True)
def the_needle_is_kept_however_much_follows(case: LayerCase) -> Seen:
    """One pair among 60 tokens of noise is recalled; a sliding window that takes many times the bytes has lost it."""
    task = PairRecall(pairs=1, noise=60)
    window = fitted(SlidingWindow()).replace(window=16)
    mine, theirs = case.recall(task), case.recall(task, window)
    held = [state_after(case.lm([{"mixer": mixer}]), case.ids(1, 60)).nbytes for mixer in (case.fitted, window)]
    seen = {"right answers": mine, "of a sliding window": theirs, "bytes": held}
    expect(held[0] * 10 < held[1], f"it does not take a tenth of the bytes: {seen}")
    expect(min(mine) > max(theirs) + 0.3, f"the window does nearly as well: {seen}")
    return seen


@claim(slow=True)
def a_token_cannot_choose_what_it_asks_for(case: LayerCase) -> Seen:
    """Of four pairs softmax attention recalls nearly all; with a query that is the same for all tokens it is fewer."""
    task = PairRecall(pairs=4)
    mine, theirs = case.recall(task), case.recall(task, "softmax")
    seen = {"right answers": mine, "of softmax attention": theirs, "chance": task.chance}
    expect(min(theirs) > max(mine) + 0.2, f"softmax attention hardly does better: {seen}")
    return seen
