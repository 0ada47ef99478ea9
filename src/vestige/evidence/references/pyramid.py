"""PyramidKV (arXiv 2406.02069, section 4.2): budgets that fall from layer to layer along a line.

With L layers, a budget of k entries per head of which w (sinks and recent tokens) are kept in any case, and b = k - w,

    k_top    = b / beta,
    k_bottom = 2 b - k_top,
    k_l      = k_bottom - l (k_bottom - k_top) / (L - 1),      l = 0 ... L - 1 from the bottom,

each beside its w. The sum of the k_l is L b. Where the bottom layer would get more than the n - w tokens there are, it
gets those, and k_top = 2 b - k_bottom. Whole numbers: each is rounded down, and the entries that are then missing to
L k go to the layers that lost most, the lower first.

What ranks the tokens is the reference of the policy that the plan is laid over.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vestige.evidence.references import reference_of
from vestige.evidence.references.caching import Trace

__all__ = ["budgets", "simulate"]


def simulate(*states: Any, policy: Any, beta: float, layer: int = 0, layers: int = 1, **rest: Any) -> Trace:
    """The policy's reference under a pyramid. See :func:`~vestige.evidence.references.caching.follow`.

    Args:
        policy: what ranks the tokens, with the mean budget.
        beta: the mean budget over the top layer's.
        layer, layers: which layer this is, and of how many.
    """
    reference = reference_of(policy.name)
    assert reference is not None
    recent, sinks = policy.ranking.recent_tokens, policy.ranking.sinks

    def layer_budget(k: int, n: int) -> int:
        return budgets(k, n, sinks + recent(k), beta, layers)[layer]

    parameters = {name: getattr(policy, name) for name in policy.parameters()}
    return reference.simulate(*states, layer_budget=layer_budget, **parameters, **rest)


def budgets(k: int, n: int, w: int, beta: float, layers: int) -> list[int]:
    """The budget of each layer, from the bottom."""
    if k >= n or layers == 1:
        return [k] * layers
    b = Fraction(k - w)
    k_bottom = min(2 * b - b / Fraction(beta), Fraction(n - w))
    k_top = 2 * b - k_bottom
    exact = [w + k_bottom - layer * (k_bottom - k_top) / (layers - 1) for layer in range(layers)]
    whole = [max(1, math.floor(x)) for x in exact]
    most_missed = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
    missing = layers * k - sum(whole)
    for layer in most_missed[:missing]:
        whole[layer] += 1
    for layer in most_missed[::-1][:-missing] if missing < 0 else ():
        whole[layer] -= 1
    return whole
