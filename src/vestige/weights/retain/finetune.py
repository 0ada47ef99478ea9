"""Train on what comes, with no protection: the baseline of all learners."""

from __future__ import annotations

from typing import ClassVar

from vestige.core.method import Paper, Verdict
from vestige.weights.retain.learner import Learner

__all__ = ["Finetune"]


class Finetune(Learner):
    """Train on each experience alone, with nothing against forgetting."""

    name = "finetune"
    paper = Paper(
        title="Catastrophic Interference in Connectionist Networks: The Sequential Learning Problem",
        year=1989,
        venue="Psychology of Learning and Motivation 24",
        equations="the sequential training that the paper describes",
    )
    verdict = Verdict(
        "reproduced",
        "split digits, two at a time, small ViT, 3 seeds: learnt to 68-80%, of which 78-94 points are forgotten; "
        "16-20% right at the end",
    )

    one_process: ClassVar[bool] = False
