"""Claims of recycled attention: what the last full step looked at serves the steps that follow, for a while."""

from __future__ import annotations

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, divergence, reads_better_than_streaming
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def reading_few_entries_beats_keeping_few(case: CacheCase) -> Seen:
    """While decoding, predictions stay nearer to the model's own than with sinks and a window as large as what is
    read."""
    return reads_better_than_streaming(case)


@claim(slow=True)
def full_steps_bring_it_back(case: CacheCase) -> Seen:
    """The more often everything is read, the nearer predictions are: every 4 steps, every 16, never again."""
    strides = (4, 16, 1000)
    found = [divergence(case, case.on_lm(budget=BUDGET, stride=stride), singly=True) for stride in strides]
    seen = {f"divergence at stride {stride}": each.tolist() for stride, each in zip(strides, found, strict=True)}
    means = [float(each.mean()) for each in found]
    expect(means[0] < means[1] < means[2], f"full steps bring nothing: {seen}")
    return seen
