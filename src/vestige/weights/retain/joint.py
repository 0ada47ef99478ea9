"""Train on everything at once: what a learner that loses nothing would come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from vestige.core.method import Paper, Verdict
from vestige.weights.retain.learner import Learner, Running, snapshot
from vestige.weights.retain.session import Session
from vestige.weights.retain.stream import Experience

__all__ = ["Joint"]


class _Joint(Running):
    def start(self, session: Session) -> None:
        self.first = snapshot(session.model)

    def rows(self, session: Session, experience: Experience) -> Dataset:
        return ConcatDataset([e.train for e in session.stream.experiences[: experience.index + 1]])

    @torch.no_grad()
    def before(self, session: Session, experience: Experience) -> None:
        for name, parameter in session.trainable().items():
            parameter.copy_(self.first[name])

    def tensors(self) -> dict[str, Tensor]:
        return self.first

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.first = dict(tensors)


class Joint(Learner):
    """Train from the first weights on all experiences so far together: the upper bound of all learners.

    Each experience takes as many epochs as another learner's, over more examples; all earlier data must still be there.
    """

    name = "joint"
    paper = Paper(
        title="Multitask Learning",
        year=1997,
        venue="Machine Learning 28",
        equations="the training of all tasks in parallel on one shared representation, section 1",
    )
    verdict = Verdict(
        "reproduced",
        "split digits, class-incremental, small ViT, 3 seeds: 94%, 97%, 95% right at the end, where fine-tuning ends "
        "at 20%, 18%, 16%",
    )

    owns: ClassVar[frozenset[str]] = frozenset({"rows", "structure"})  # it goes back to the first weights, by name
    one_process: ClassVar[bool] = False
    running = _Joint
