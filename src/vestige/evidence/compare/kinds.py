"""The kinds of comparison, one for each family of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vestige.errors import SpecError
from vestige.evidence.compare.context import ContextComparison
from vestige.evidence.compare.spec import Comparison
from vestige.evidence.compare.training import TrainingComparison
from vestige.evidence.compare.weights import ErasureComparison, StreamComparison
from vestige.evidence.tasks.registry import registry
from vestige.evidence.tasks.task import Task

__all__ = ["KINDS", "kind_of"]

KINDS: tuple[type[Comparison], ...] = (ContextComparison, TrainingComparison, StreamComparison, ErasureComparison)


def kind_of(tasks: Any) -> type[Comparison]:
    """The kind of a comparison, by the first of its tasks that is known.

    Args:
        tasks: as they stand in a description: a name, a spec or a task, or several; perhaps none that is right.
    """
    several = tasks if isinstance(tasks, Iterable) and not isinstance(tasks, str | Mapping) else [tasks]
    for given in several:
        try:
            family = type(given) if isinstance(given, Task) else registry.load(_name(given))
        except SpecError:
            continue
        for kind in KINDS:
            if issubclass(family, kind.family):
                return kind
    return KINDS[0]


def _name(given: Any) -> Any:
    return given.get("name") if isinstance(given, Mapping) else given
