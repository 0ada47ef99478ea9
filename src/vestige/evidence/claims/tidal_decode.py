"""Claims of TidalDecode: what one layer attends to is what the layers after it need."""

from __future__ import annotations

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, divergence, reads_better_than_streaming
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def positions_of_two_layers_serve_all(case: CacheCase) -> Seen:
    """While decoding, predictions stay nearer to the model's own than with sinks and a window as large as what is
    read."""
    return reads_better_than_streaming(case)


@claim(slow=True)
def choosing_again_helps(case: CacheCase) -> Seen:
    """A second layer that chooses brings predictions nearer: what matters does change a little on the way up."""
    twice = divergence(case, case.on_lm(budget=BUDGET), singly=True)
    once = divergence(case, case.on_lm(budget=BUDGET, again=None), singly=True)
    seen = {"divergence": twice.tolist(), "with one layer that chooses": once.tolist()}
    expect(float(twice.mean()) < float(once.mean()), f"the second choice brings nothing: {seen}")
    return seen
