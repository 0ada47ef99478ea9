"""Ada-KV (arXiv 2407.11550, algorithms 1 and 2): a budget per head.

Of H heads with b entries each, let f_h be the number of head h's tokens among the H b tokens that rank highest over
all heads; each head's highest is always one of them. Head h is given

    b_h = (1 - s) f_h + s b

entries, with s the safeguard; then it keeps its own b_h highest. The sum of the b_h is H b. Whole numbers: each is
rounded down, and the entries that are then missing go to the heads that lost most.

What ranks the tokens is the reference of the policy that the plan is laid over.
"""

from __future__ import annotations

import math
from typing import Any

from vestige.evidence.references import asked_of, reference_of
from vestige.evidence.references.caching import Trace

__all__ = ["simulate"]


def simulate(*states: Any, policy: Any, safeguard: float, layer: int = 0, layers: int = 1, **rest: Any) -> Trace:
    """The policy's reference with unequal heads. See :func:`~vestige.evidence.references.caching.follow`.

    Args:
        policy: what ranks the tokens, with the mean budget.
        safeguard: s, the share of the budget that all heads get alike.
        layer, layers: which layer this is, and of how many; for a policy that goes by it.
    """
    reference = reference_of(policy.name)
    assert reference is not None

    def share(ranks: list[dict[int, float]], b: int) -> list[int]:
        heads = len(ranks)
        ranks = [{**own, max(own, key=lambda p: (own[p], -p)): math.inf} for own in ranks]
        everything = [(rank, head, p) for head, own in enumerate(ranks) for p, rank in own.items()]
        if len(everything) <= heads * b:
            return [b] * heads
        everything.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        best = [head for _, head, _ in everything[: heads * b]]
        exact = [(1 - safeguard) * best.count(head) + safeguard * b for head in range(heads)]
        room = [len(own) for own in ranks]
        whole = [min(max(1, math.floor(x)), most) for x, most in zip(exact, room, strict=True)]
        while sum(whole) < len(best):
            open_heads = [head for head in range(heads) if whole[head] < room[head]]
            whole[max(open_heads, key=lambda head: (exact[head] - whole[head], -head))] += 1
        while sum(whole) > len(best):
            whole[max(range(heads), key=lambda head: (whole[head] - exact[head], head))] -= 1
        return whole

    parameters = {name: getattr(policy, name) for name in policy.parameters()}
    rest |= asked_of(reference.simulate, {"layer": layer, "layers": layers})
    return reference.simulate(*states, share=share, **parameters, **rest)
