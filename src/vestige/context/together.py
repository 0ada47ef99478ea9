"""One reading of a text that serves several policies.

What a policy notes while a text is read whole depends on the text alone, not on what the policy will drop later. So
policies that read as the model itself does can share the pass: each writes down what it needs, and afterwards each
has its own view of the cache, to be cut to any budget.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from vestige.context.attention import Look
from vestige.context.cache import KeptCache
from vestige.context.layer import KeptLayer, Step
from vestige.context.plan.sharing import Sharing
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.core.method import param
from vestige.errors import SpecError

__all__ = ["Together"]


class Together(CachePolicy):
    """Keep everything, and let several policies take their notes of it.

    ``attach`` it, run the text through the model once, and take from ``kept.cache`` the :meth:`part` of each policy::

        with Together(policies=(H2O(budget=1.0), SnapKV(budget=1.0))).attach(model) as kept:
            model(ids, logits_to_keep=1)
            small = kept.policy.part(kept.cache, 0).cut(128)

    Raises:
        SpecError: a policy reads otherwise than the model does, so that it needs a pass of its own.
    """

    policies: tuple[CachePolicy, ...] = param(help="the policies; under a budget of 1.0, so that none drops anything")

    def check(self) -> None:
        for policy in self.policies:
            if not self.takes(policy):
                raise SpecError(f"{policy.name} reads in its own way: it cannot share a pass with other policies")

    @staticmethod
    def takes(policy: CachePolicy) -> bool:
        """Whether a policy's cache, while nothing is dropped, is the model's own."""
        inner = policy.policy if isinstance(policy, Sharing) else policy
        own = (getattr(type(inner), name) for name in ("new_layer", "respond", "reread"))
        plain = (CachePolicy.new_layer, CachePolicy.respond, CachePolicy.reread)
        return (
            policy.ranking is policy
            and not policy.without_cache
            and all(a is b for a, b in zip(own, plain, strict=True))
        )

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return any(policy.needs_attention for policy in self.policies)

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return any(policy.needs_queries for policy in self.policies)

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override]
        return any(policy.needs_rotary for policy in self.policies)

    @property
    def plain(self) -> bool:
        return all(policy.plain for policy in self.policies)

    def on(self, anatomy: Anatomy) -> Together:
        return replace(self, policies=tuple(policy.on(anatomy) for policy in self.policies))

    def check_model(self, anatomy: Anatomy) -> None:
        for policy in self.policies:
            policy.check_model(anatomy)

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        for policy in self._noting(entries):
            if not step.decoding or policy.needs_queries:
                policy.observe(entries, look, step)

    def receive(self, entries: KeptLayer, share: Tensor, step: Step) -> None:
        for policy in self._noting(entries):
            if policy.needs_attention:
                policy.receive(entries, share, step)

    def part(self, cache: KeptCache, index: int) -> KeptCache:
        """The cache as one policy would have filled it, sharing keys and values with the others': ``cut`` or ``fork``
        it before it is used."""
        view = cache._twin()
        view.policy = self.policies[index]
        for place, layer in enumerate(cache.layers):
            own = copy.copy(layer)
            own.cache, own.state, own.aside = view, _of(layer.state, index), _of(layer.aside, index)
            view.layers[place] = own
        return view

    def _noting(self, entries: KeptLayer) -> Iterator[CachePolicy]:
        """The policies in turn, each with its own notes in ``entries``."""
        for index, policy in enumerate(self.policies):
            with _alone(entries, index):
                yield policy


@contextmanager
def _alone(entries: KeptLayer, index: int) -> Iterator[None]:
    state, aside = entries.state, entries.aside
    entries.state, entries.aside = _of(state, index), _of(aside, index)
    try:
        yield
    finally:
        entries.state = state | _named(entries.state.items(), index)
        entries.aside = aside | _named(entries.aside.items(), index)


def _named(notes: Iterable[tuple[str, Any]], index: int) -> dict[str, Any]:
    return {f"note {index} {name}": note for name, note in notes}


def _of(notes: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"note {index} "
    return {name.removeprefix(start): note for name, note in notes.items() if name.startswith(start)}
