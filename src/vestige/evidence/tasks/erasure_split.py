"""Forgetting some examples and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vestige.core.spec import param
from vestige.evidence.tasks.task import TaskScore
from vestige.evidence.tasks.weights import WeightsTask

__all__ = ["ErasureSplit"]


class ErasureSplit(WeightsTask):
    """Forget the examples that have a value in a column, and be as if they had never been learnt.

    The value is the *tug of war*: over the examples to forget, those to keep and unseen ones, the product of one minus
    the distance of the accuracy from that of a model that was trained without what is to be forgotten. It is 1 where
    nothing tells the two apart; forgetting too little lowers it, and so does forgetting too much. Source: Zhao et al.
    (arXiv 2406.01257), section 3.
    """

    name = "erasure-split"
    version = 1
    metric = "tug of war"

    column: str = param("label", "column by whose value examples are forgotten; random: any, so many as the value")
    value: int | str = param(3, "value of the examples that are to be forgotten")

    @property
    def chance(self) -> None:
        """There is nothing to guess."""
        return None

    @property
    def forget(self) -> dict[str, Any]:
        """What is to be forgotten, as :func:`~vestige.evidence.runs.sources.chosen` takes it."""
        return {self.column: self.value}

    def scored(self, erased: Mapping[str, float], retrained: Mapping[str, float]) -> TaskScore:
        """What accuracies by set come to, beside those of the model that was trained without."""
        value = 1.0
        for name, accuracy in erased.items():
            value *= 1 - abs(accuracy - retrained[name])
        return TaskScore(metric=self.metric, values=(value,))
