"""Learning one thing after the other."""

from __future__ import annotations

from typing import Any, Literal

from vestige.core.spec import param
from vestige.evidence.tasks.task import TaskScore
from vestige.evidence.tasks.weights import WeightsTask

__all__ = ["ExperienceStream"]


class ExperienceStream(WeightsTask):
    """Learn the classes of images, or the kinds of questions, one group after the other, and be asked all at the end.

    The value of an example is the score on one experience after the last was learnt: accuracy, or of questions the mean
    log-likelihood of a token of the answer. A learner that only learns what comes forgets what was there.
    """

    name = "experience-stream"
    version = 1

    experiences: int | str | tuple[tuple[int, ...], ...] = param(
        5, "how many, of equally many classes each; the classes of each; or the column by which questions are split"
    )
    kind: Literal["class", "task"] = param(
        "class", "class: answers are among all classes; task: among the experience's"
    )

    @property
    def chance(self) -> float | None:
        """One over the classes of digits; of other examples it is not known before they are read."""
        return 1 / 10 if self.data == "digits" and self.kind == "class" else None

    def scored(self, run: Any) -> TaskScore:
        """What a :class:`~vestige.weights.retain.ContinualRun` comes to."""
        return TaskScore(metric=run.unit, values=tuple(float(value) for value in run.matrix[-1]))
