"""What erasers that train share: a loop over forget batches with a retain batch beside each, and its stop rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vestige.core.method import param
from vestige.core.patch import Patch
from vestige.weights.erase.eraser import Eraser, Trace, Work, finite
from vestige.weights.erase.examples import Row

__all__ = ["Adam", "Descent", "Step"]


@dataclass(frozen=True)
class Step:
    """What one step is made of.

    Attributes:
        epoch: passes over the forget set that are complete.
        places: of the rows to forget in the forget set (rows,).
        forget: these rows.
        kept: batches to keep, without end; the next is this step's.
    """

    epoch: int
    places: Tensor
    forget: Row
    kept: Iterator[Row]


class Adam:
    """Adam on weights of any precision: 16-bit weights have float32 copies, which steps too small for them add up in.

    No weight decay: a weight without gradient stays as it is, bit for bit.

    Args:
        weights: those to train; their ``.grad`` is left alone.
        learning_rate: the step size.
        clip: largest norm of all gradients together; ``None`` for any.
        masks: where a weight may change, one per weight.
    """

    def __init__(
        self, weights: list[nn.Parameter], learning_rate: float, clip: float | None, masks: list[Tensor] | None = None
    ) -> None:
        self.weights, self.clip, self.masks = weights, clip, masks
        self.masters = [
            p.detach() if p.dtype in (torch.float32, torch.float64) else p.detach().float() for p in weights
        ]
        self.optimizer = torch.optim.Adam(self.masters, lr=learning_rate)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss.

        Raises:
            TrainingError: the loss or its gradient is not finite.
        """
        found = torch.autograd.grad(finite(loss, "the loss"), self.weights, allow_unused=True)
        for n, (master, gradient) in enumerate(zip(self.masters, found, strict=True)):
            master.grad = None if gradient is None else gradient.detach().to(master.dtype)
            if master.grad is not None and self.masks is not None:
                master.grad *= self.masks[n]
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip if self.clip is not None else float("inf"))
        finite(norm, "the gradient")
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight.dtype != master.dtype:
                    weight.copy_(master)


class Descent(Eraser):
    """Base of erasers that train.

    A step goes down the loss on a batch to forget plus ``retain_weight`` times the mean loss on a batch to keep. An
    epoch is one pass over the forget set. The model is looked at after every epoch, or every ``check_every`` steps.
    """

    holds_out: ClassVar[bool] = True

    learning_rate: float = param(1e-5, "step size of Adam", gt=0)
    epochs: int = param(5, "passes over the forget set", ge=1)
    retain_weight: float = param(1.0, "weight of the loss on examples to keep", ge=0)
    clip: float | None = param(1.0, "largest norm of the gradient; None for any", gt=0)
    tolerance: float | None = param(
        0.5, "nats by which the held-out loss may rise before the last good weights are taken; None for any", ge=0
    )
    target: float | None = param(None, "stop once accuracy on the forget set is at most this; None: never", ge=0, le=1)
    check_every: int | None = param(None, "steps between two looks at the scores; None for once an epoch", ge=1)

    def prepare(self, work: Work) -> Any:
        """What the loss needs to know beforehand, from the untouched model."""
        return None

    def forget_loss(self, work: Work, places: Tensor, batch: Row, known: Any) -> Tensor:
        """The loss on a batch to forget, whose gradient is gone down.

        Args:
            places: of the rows in the forget set (rows,).
            batch: the rows.
            known: from :meth:`prepare`.
        """
        raise NotImplementedError

    def _apply(self, work: Work, patch: Patch, trace: Trace) -> None:
        self.descend(work, patch, trace)

    def loss(self, work: Work, step: Step, known: Any) -> Tensor:
        """The loss of a step."""
        loss = self.forget_loss(work, step.places, step.forget, known)
        return loss + self.retain_weight * work.losses(next(step.kept)).mean() if self.retain_weight else loss

    def descend(self, work: Work, patch: Patch, trace: Trace, masks: dict[str, Tensor] | None = None) -> None:
        """Train; with masks, only where they are true."""
        known = self.prepare(work)
        weights = list(work.parameters.values())
        for weight in weights:
            patch.parameter(weight, weight.detach())  # the patch keeps what is about to change
        chosen = None if masks is None else [masks[name] for name in work.parameters]
        self.train(work, trace, Adam(weights, self.learning_rate, self.clip, chosen), known)

    def train(self, work: Work, trace: Trace, adam: Adam, known: Any) -> None:
        """Take steps with an optimizer until the epochs are over or a stop rule ends it."""
        watch = _Watch(self, work, trace, adam.weights)
        draw = work.generator()
        kept = work.retain.forever(work.batch_size, work.device, work.generator(1))
        step = 0
        for epoch in range(self.epochs):
            for places, batch in work.batches(work.forget, draw):
                adam.step(self.loss(work, Step(epoch, places, batch, kept), known))
                step += 1
                if self.check_every and step % self.check_every == 0 and watch.ends(step):
                    return
            if not self.check_every and watch.ends(step):
                return
        if self.check_every and step % self.check_every:
            watch.ends(step)


class _Watch:
    """Looks at the scores, keeps the last good weights, and says when to stop."""

    def __init__(self, eraser: Descent, work: Work, trace: Trace, weights: list[nn.Parameter]) -> None:
        self.eraser, self.work, self.trace, self.weights = eraser, work, trace, weights
        self.start = work.scores()["held_out_loss"]
        self._keep()

    def ends(self, step: int) -> bool:
        eraser, scores = self.eraser, self.work.scores()
        self.trace.history.append({"step": step, **scores})
        self.trace.report["steps"] = step
        if eraser.tolerance is not None and scores["held_out_loss"] > self.start + eraser.tolerance:
            self._restore()
            self.trace.stopped = "over-forgetting"
            return True
        self.trace.report["kept_step"] = step
        if eraser.target is not None and scores["forget_accuracy"] <= eraser.target:
            self.trace.stopped = "target"
            return True
        self._keep()
        return False

    def _keep(self) -> None:
        if self.eraser.tolerance is not None:
            self.good = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, good in zip(self.weights, self.good, strict=True):
            weight.copy_(good)
