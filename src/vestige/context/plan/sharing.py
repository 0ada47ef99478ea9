"""Plans that share out the budget of another policy; what ranks the entries stays that policy's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor

from vestige.context.around import Around
from vestige.context.attention import Look
from vestige.context.cache import KeptCache
from vestige.context.evict.snapkv import SnapKV
from vestige.context.layer import KeptLayer, Step
from vestige.context.policy import CachePolicy, Ranking
from vestige.core.method import param
from vestige.errors import SpecError

__all__ = ["Sharing", "apportion"]


class Sharing(Around, Ranking):
    """A plan over a policy that evicts: the same score, the same total, unequal parts.

    Every question that the cache asks goes on to the policy, but for how its budget is shared out.
    """

    policy: CachePolicy = param(factory=SnapKV, help="what ranks the entries, and the mean budget per head")

    def check(self) -> None:
        ranking = self.policy.ranking
        if ranking is None:
            raise SpecError(f"{self.name}: parameter 'policy' is {self.policy.name}, which keeps every entry")
        if type(ranking).head_budgets is not Ranking.head_budgets:
            raise SpecError(
                f"{self.name}: parameter 'policy' is {self.policy.name}, which says itself what each head may hold"
            )
        if self.policy.needs_rotary and type(self.policy).present is not CachePolicy.present:
            raise SpecError(
                f"{self.name}: parameter 'policy' is {self.policy.name}, which turns keys by the number of entries "
                "held; that differs from layer to layer here (see its parameters for a form that does not)"
            )

    @property
    def _inner(self) -> Ranking:
        ranking = self.policy.ranking
        assert ranking is not None
        return ranking

    @property
    def comparable(self) -> bool:  # type: ignore[override]
        return self._inner.comparable

    @property
    def plain(self) -> bool:
        return self.policy.plain

    @property
    def sinks(self) -> int:  # type: ignore[override]
        return self._inner.sinks

    @property
    def lag(self) -> int:  # type: ignore[override]
        return self._inner.lag

    def new_layer(self, cache: KeptCache, index: int) -> KeptLayer:
        return self.policy.new_layer(cache, index)

    def lossless(self, tokens: int) -> Self | None:
        policy = self.policy.lossless(tokens)
        return None if policy is None else self.replace(policy=policy)

    def present(self, entries: KeptLayer, step: Step) -> None:
        self.policy.present(entries, step)

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        return self.policy.respond(entries, look, step, plain)

    def score(self, entries: KeptLayer) -> Tensor:
        return self._inner.score(entries)

    def budget_tokens(self, seen: int) -> int:
        return self._inner.budget_tokens(seen)

    def recent_tokens(self, allowed: int) -> int:
        return self._inner.recent_tokens(allowed)

    def acts(self, decoding: bool) -> bool:
        return self._inner.acts(decoding)

    def layer_budgets(self, budgets: list[int], real: list[int], layer: int, layers: int) -> list[int]:
        return self._inner.layer_budgets(budgets, real, layer, layers)

    def share_out(self, rank: Tensor, budgets: list[int]) -> Tensor | None:
        return self._inner.share_out(rank, budgets)


def apportion(wishes: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Whole numbers near the wishes that add up to ``total``, or to as much as ``most`` allows.

    Each is at least one (where ``most`` allows that). What rounding down leaves goes, one by one, to whoever
    is furthest below the wish.
    """
    total = min(total, sum(most))
    low = [min(1, cap) for cap in most]
    given = [min(max(math.floor(wish), floor), cap) for wish, floor, cap in zip(wishes, low, most, strict=True)]
    places: Any = range(len(given))
    while sum(given) < total:
        given[max((i for i in places if given[i] < most[i]), key=lambda i: (wishes[i] - given[i], -i))] += 1
    while sum(given) > total:
        given[min((i for i in places if given[i] > low[i]), key=lambda i: (wishes[i] - given[i], -i))] -= 1
    return given
