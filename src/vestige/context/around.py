"""A policy over another policy."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from vestige.context.attention import Look
from vestige.context.layer import KeptLayer, Step
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.core.method import param

__all__ = ["Around"]


class Around(CachePolicy):
    """What decides one thing itself and leaves the rest to the policy that it goes around."""

    policy: CachePolicy = param(help="the policy that it goes around")

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.policy.needs_attention

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.policy.needs_queries

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override]
        return self.policy.needs_rotary

    def check_model(self, anatomy: Anatomy) -> None:
        self.policy.check_model(anatomy)

    def with_budget(self, budget: int | float) -> Self:
        return self.replace(policy=self.policy.with_budget(budget))

    def places(self, entries: KeptLayer) -> Tensor:
        return self.policy.places(entries)

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        self.policy.observe(entries, look, step)

    def receive(self, entries: KeptLayer, share: Tensor, step: Step) -> None:
        self.policy.receive(entries, share, step)
