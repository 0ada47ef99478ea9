"""Claims of linear attention: all of the past in one matrix."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.mixing import LayerCase, recalls_more
from vestige.evidence.certify.suite import Seen
from vestige.evidence.claims import claim
from vestige.evidence.tasks.recall import PairRecall


@claim(slow=True)
def it_sees_further_than_a_window_of_its_size(case: LayerCase) -> Seen:
    """With noise between, it recalls what a sliding window that takes as many bytes has lost."""
    task = PairRecall(pairs=4, noise=24)
    width = 16  # of a head, in the small model that is taught
    window = vestige.method("sliding-window", window=2 + (width + 1) // 2)  # keys and values of one token: 2 * width
    return recalls_more(case, task, window, "a window of its size", by=0.2)
