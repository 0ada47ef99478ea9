"""Read once, serve many: one pass over a text for all policies and budgets that can share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.context.together import Together
from vestige.evidence.budgets import at, evicts, own_budget
from vestige.evidence.engine.bench import now

if TYPE_CHECKING:
    from vestige.context.cache import KeptCache
    from vestige.context.kept import Kept
    from vestige.context.policy import CachePolicy

__all__ = ["Reading", "read", "reading_groups"]


def reading_groups(policies: Iterable[CachePolicy]) -> list[tuple[CachePolicy, ...]]:
    """The policies in groups that :func:`read` can take together.

    Those that read as the model does share a pass; each of the others has one of its own.
    """
    policies = tuple(policies)
    shared = tuple(policy for policy in policies if Together.takes(at(policy, 1.0)))
    return ([shared] if shared else []) + [(policy,) for policy in policies if policy not in shared]


class Reading:
    """A text that was read, with everything kept and ranked.

    Attributes:
        seconds: that the pass took.
        kept: the attachment; the model stays attached while the reading is in use.
    """

    def __init__(self, kept: Kept, policies: Sequence[CachePolicy], seconds: float) -> None:
        self.kept, self.policies, self.seconds = kept, policies, seconds
        assert kept.cache is not None
        self._cache: KeptCache = kept.cache

    def cache(self, place: int = 0, budget: int | float | None = None) -> KeptCache:
        """A cache of its own, as the policy at ``place`` leaves it under a budget (its own where None is given).

        It drops no entries afterwards where the policy evicts, so a question can be asked in one piece.
        """
        policy = self.policies[place]
        shared = self.kept.policy
        read = shared.part(self._cache, place) if isinstance(shared, Together) else self._cache
        if policy.ranking is None or not (evicts(policy) or policy.ranking.acts(decoding=False)):
            return read.fork()
        if not evicts(policy):
            return read.cut()  # what a plan by windows leaves
        return read.cut(own_budget(policy) if budget is None else budget)


@contextmanager
def read(
    model: Any,
    policies: Sequence[CachePolicy],
    ids: Int[Tensor, "batch length"],
    attention_mask: Int[Tensor, "batch length"] | None = None,
    position_ids: Int[Tensor, "batch length"] | None = None,
) -> Iterator[Reading]:
    """Run a text through a model once; what comes out of the ``with`` gives caches for every policy and budget.

    Args:
        policies: one of the groups that :func:`reading_groups` makes.
        ids: the text, rows padded on the left where they differ in length.
        attention_mask: 0 for padding.
        position_ids: place of each token among its row's real ones, where there is padding.
        position_ids: for models that would else count padding as text.

    Raises:
        SpecError: the policies cannot share a pass.
    """
    whole = tuple(at(policy, 1.0) for policy in policies)
    reader = Together(policies=whole) if len(whole) > 1 else whole[0]
    with reader.attach(model) as kept, torch.inference_mode():
        began = now(model.device)
        places = {} if position_ids is None else {"position_ids": position_ids}
        model(ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1, **places)
        yield Reading(kept, policies, now(model.device) - began)
