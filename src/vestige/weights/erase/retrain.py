"""Train anew without what is to be forgotten: what every eraser is measured against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vestige.core.method import Paper, Verdict, param
from vestige.core.patch import Patch
from vestige.errors import InputError
from vestige.weights.erase.descent import Adam
from vestige.weights.erase.eraser import Eraser, Trace, Work
from vestige.weights.erase.examples import Collate
from vestige.weights.erase.losses import row_losses

__all__ = ["Retrain"]


class Retrain(Eraser):
    """Train a fresh model on the retain set alone, and give its weights to the model: exact, and expensive."""

    name = "retrain"
    paper = Paper(
        title="Machine Unlearning",
        year=2019,
        arxiv="1912.03817",
        venue="IEEE S&P 2021",
        equations="retraining from scratch, the baseline of section 2",
    )
    verdict = Verdict(
        "reproduced",
        "class 3 of scikit-learn's digits, small ViT, 3 seeds: test accuracy on it 0.00, on the others 0.96-0.98",
    )

    learning_rate: float = param(1e-3, "step size of Adam", gt=0)
    epochs: int = param(10, "passes over the retain set", ge=1)
    clip: float | None = param(1.0, "largest norm of the gradient; None for any", gt=0)

    def erase(
        self,
        model: nn.Module,
        *,
        forget: Any,
        retain: Any,
        held_out: Any = None,
        batch_size: int = 32,
        collate: Collate | None = None,
        seed: int = 0,
        start: Callable[[], nn.Module] | None = None,
    ) -> Trace:
        """As :meth:`Eraser.erase`, with what the training starts from.

        Args:
            start: makes the model that has not seen any of the examples, with weights of the same names and shapes.

        Raises:
            InputError: ``start`` is missing, or makes a model with other weights.
        """
        if not callable(start):
            raise InputError(f"retrain: start is {start!r}; allowed: a function that makes the untrained model")
        work = self._work(model, forget, retain, held_out, batch_size, collate, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = start()
        _check_alike(model, fresh)
        return self._carry_out(work, lambda patch, trace: self._train(work, fresh.to(work.device), patch, trace))

    def _train(self, work: Work, fresh: nn.Module, patch: Patch, trace: Trace) -> None:
        named = dict(fresh.named_parameters())
        adam = Adam([named[name] for name in work.parameters], self.learning_rate, self.clip)
        draw, steps = work.generator(), 0
        with torch.random.fork_rng(devices=[work.device] if work.device.type == "cuda" else []):
            torch.manual_seed(work.seed)
            fresh.train()
            for _ in range(self.epochs):
                for _, batch in work.batches(work.retain, draw):
                    given = {key: value for key, value in batch.items() if key != "labels"}
                    adam.step(row_losses(fresh(**given).logits, batch["labels"], work.reader.causal).mean())
                    steps += 1
        changed = {**named, **dict(fresh.named_buffers())}
        for name, tensor in (*work.model.named_parameters(), *work.model.named_buffers()):
            patch.parameter(tensor, changed[name].detach())
        trace.report["steps"] = steps


def _check_alike(model: nn.Module, fresh: Any) -> None:
    if fresh is model or not isinstance(fresh, nn.Module):
        raise InputError(f"retrain: start made {'the model itself' if fresh is model else type(fresh).__name__}")
    own, new = (
        {name: tuple(t.shape) for name, t in (*m.named_parameters(), *m.named_buffers())} for m in (model, fresh)
    )
    for name in own.keys() | new.keys():
        if own.get(name) != new.get(name):
            raise InputError(
                f"retrain: start made a model whose {name} is {new.get(name, 'absent')}; "
                f"allowed: {own.get(name, 'absent')}, as in the model"
            )
