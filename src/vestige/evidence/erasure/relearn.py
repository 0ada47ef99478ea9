"""How soon a model knows again what it was made to forget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vestige.core.patch import Patch
from vestige.errors import SpecError
from vestige.weights.erase.descent import Adam
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Examples

__all__ = ["Relearned", "Relearning", "relearn"]


@dataclass(frozen=True)
class Relearning:
    """How a model is taught again; the same for every model of an audit.

    Attributes:
        learning_rate: of Adam.
        steps: at most.
        every: steps between two looks.
        batch: rows in a step.
        goal: share of the accuracy that the untouched model has (1 where there is none) which counts as known again.

    Raises:
        SpecError: a value is out of range.
    """

    learning_rate: float = 1e-4
    steps: int = 50
    every: int = 2
    batch: int = 8
    goal: float = 0.9

    def __post_init__(self) -> None:
        for name in ("steps", "every", "batch"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise SpecError(f"parameter {name!r} is {getattr(self, name)!r}; allowed: a whole number >= 1")
        if not self.learning_rate > 0:
            raise SpecError(f"parameter 'learning_rate' is {self.learning_rate!r}; allowed: > 0")
        if not 0 < self.goal <= 1:
            raise SpecError(f"parameter 'goal' is {self.goal!r}; allowed: above 0, up to 1")


@dataclass(frozen=True)
class Relearned:
    """What came of it.

    Attributes:
        steps: looked at, from 0.
        taught: accuracy on the rows that are taught, at each.
        rest: accuracy on the rows to forget that are not taught.
    """

    steps: tuple[int, ...]
    taught: tuple[float, ...]
    rest: tuple[float, ...]

    def reached(self, accuracy: float) -> int | None:
        """The first look at which the rows taught are known to an accuracy; ``None`` if there is none."""
        return next((step for step, found in zip(self.steps, self.taught, strict=True) if found >= accuracy), None)


def relearn(work: Work, taught: Examples, rest: Examples, how: Relearning) -> Relearned:
    """Teach some rows, and look at these and the others; the model has its own weights again afterwards.

    Raises:
        TrainingError: a loss is not finite.
    """
    steps, known, others = [], [], []
    patch = Patch(work.model, "relearning")
    with patch:
        weights = list(work.parameters.values())
        for weight in weights:
            patch.parameter(weight, weight.detach())
        adam = Adam(weights, how.learning_rate, 1.0)
        batches = taught.forever(how.batch, work.device, work.generator(3))
        for step in range(how.steps + 1):
            if step % how.every == 0 or step == how.steps:
                steps.append(step)
                known.append(work.score(taught)[1])
                others.append(work.score(rest)[1])
            if step < how.steps:
                with torch.enable_grad():
                    adam.step(work.losses(next(batches)).mean())
    return Relearned(tuple(steps), tuple(known), tuple(others))
