"""Which tasks there are.

A task registers by being defined, as methods do; third parties add theirs through the entry point group
``vestige.tasks``. Listing tasks imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vestige.core.registry import TASKS, Card, Registry

if TYPE_CHECKING:
    from vestige.evidence.tasks.task import Task

__all__ = ["TaskCard", "registry", "task", "tasks"]


@dataclass(frozen=True, kw_only=True)
class TaskCard(Card):
    """What is known of a task without importing it; fields as in :class:`vestige.evidence.tasks.task.Task`."""

    version: int = 1
    metric: str = "accuracy"
    higher_is_better: bool = True


registry = Registry("task", TaskCard, folders=(TASKS,), group="vestige.tasks")


def tasks() -> list[TaskCard]:
    """The cards of all tasks. Nothing heavy is imported."""
    return registry.cards()


def task(name: str, **parameters: Any) -> Task:
    """Build a task by name: ``vestige.task("needle", length=512)``.

    Raises:
        SpecError: unknown name (with the nearest names), unknown parameter, wrong type, value out of range.
    """
    return registry.load(name)(**parameters)
