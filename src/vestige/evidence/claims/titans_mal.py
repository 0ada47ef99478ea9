"""Claims of Titans' memory as a layer: near and far."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.memorising import echo
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim
def it_knows_what_is_beyond_its_window(case: LayerCase) -> Seen:
    """What stood four times as far back as attention sees changes its output, and not that of attention within a window
    as long."""
    size = case.fitted.window
    window = vestige.method("sliding-window", window=size)
    mine, plain = ([echo(case, mixer, 4 * size + 1, seed) for seed in case.seeds] for mixer in (case.fitted, window))
    seen = {"change of the output": mine, "of attention within a window": plain}
    expect(min(mine) > 1e-4 and max(plain) == 0, f"nothing is known of what lies beyond: {seen}")
    return seen
