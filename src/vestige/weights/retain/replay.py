"""Experience replay (arXiv 1902.10486): train on a few stored examples beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vestige.core.method import Paper, Verdict, param
from vestige.weights.retain.buffer import Buffer, Selection
from vestige.weights.retain.learner import Batch, Learner, Running, held
from vestige.weights.retain.session import Session

__all__ = ["Replay", "WithBuffer"]


class WithBuffer(Running):
    """A learner that fills a buffer with what passes by, each row once: during the first epoch of its experience.

    A row is offered after the update that it took part in. Where a learner keeps something beside each row, it puts
    that into ``beside`` while it computes the loss.
    """

    def __init__(self, learner: Any) -> None:
        super().__init__(learner)
        self.buffer = Buffer(learner.size, getattr(learner, "selection", "reservoir"))
        self.passing: list[tuple[int, int, Tensor | None]] = []

    def note(self, session: Session, beside: Tensor | None = None) -> None:
        """Remember the current micro-batch until its update has been made."""
        if session.epoch < 1:
            rows = zip(session.indices.tolist(), session.tasks.tolist(), strict=True)
            self.passing += [(i, t, None if beside is None else beside[n]) for n, (i, t) in enumerate(rows)]

    def stepped(self, session: Session) -> None:
        for index, task, beside in self.passing:
            self.buffer.insert(session, index, task, beside)
        self.passing = []

    def tensors(self) -> dict[str, Tensor]:
        return self.buffer.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.buffer.load(tensors)

    def nbytes(self) -> dict[str, int]:
        return {"replay_bytes": held(self.buffer.tensors()), "state_bytes": 0}


class _Replay(WithBuffer):
    def loss(self, session: Session, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        new = len(session.indices)
        if len(self.buffer):
            drawn = self.buffer.draw(session, max(1, round(self.learner.ratio * new)))
            old = len(drawn.tasks)
            again = session.objective(session.forward(drawn.batch), drawn.batch, drawn.tasks)
            loss = (new * loss + old * again) / (new + old)
        self.note(session)
        return loss


class Replay(Learner):
    """Keep some examples of what was learnt and train on a few of them in every step.

    The loss is the mean over new and stored rows together.
    """

    name = "replay"
    paper = Paper(
        title="On Tiny Episodic Memories in Continual Learning",
        year=2019,
        arxiv="1902.10486",
        equations="Algorithm 1 with reservoir sampling (Algorithm 2); class-balanced is its ring buffer's aim",
    )
    verdict = Verdict(
        "reproduced",
        "split digits, class-incremental, small ViT, 3 seeds, room for 200 of 240 rows: 75%, 88%, 49% right "
        "at the end, where fine-tuning ends at 20%, 18%, 16%",
    )

    size: int = param(200, "examples kept at most", ge=1)
    ratio: int | float = param(1.0, "stored rows in a step for each new one", gt=0)
    selection: Selection = param("reservoir", "which examples stay")

    running = _Replay
