"""What each method claims to do better than its naive baseline, as functions that can fail.

The module ``vestige.evidence.claims.<slug>`` (third parties: the entry point group ``vestige.claims``) holds the
claims of one method. A claim takes the case of the method's family, runs over ``case.seeds``, returns the numbers
that it saw, and raises :class:`~vestige.evidence.certify.suite.CheckFailed` where the baseline does as well::

    @claim
    def sinks_keep_the_perplexity(case: CacheCase) -> Seen:
        "With the first four tokens kept, perplexity stays near the full cache's; with none of them it explodes."

A claim that takes ten seconds and more is marked ``@claim(slow=True)``: the certificate runs it, the plain
test run leaves it out. A claim that was not seen to hold at the scale that fits here stays: the method's
``verdict`` says ``not reproduced`` with what was seen, and the certificate reports it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vestige.core.method import Method
from vestige.evidence.slugs import module_of

__all__ = ["claim", "claims_of"]

ENTRY_POINTS = "vestige.claims"

Claim = Callable[[Any], Mapping[str, Any] | None]


def claim(function: Claim | None = None, *, slow: bool = False) -> Any:
    """Mark a function of a claims module as a claim."""

    def mark(function: Claim) -> Claim:
        function.slow_claim = slow  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def claims_of(cls: type[Method]) -> list[tuple[Claim, bool]]:
    """The claims of a method class in the order of their definition, each with whether it is slow."""
    module = module_of(__name__, cls.name, ENTRY_POINTS) if hasattr(cls, "name") else None
    found = vars(module).values() if module else ()
    return [(function, function.slow_claim) for function in found if hasattr(function, "slow_claim")]
