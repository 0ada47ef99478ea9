"""What an eraser is: it changes a model's weights so that some examples leave no trace in them, undoably."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vestige.core.method import Method
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError, TrainingError, UnsupportedModelError
from vestige.weights.erase.examples import Collate, Examples, Reader, Row, disjoint
from vestige.weights.erase.losses import row_accuracy, row_losses
from vestige.weights.modes import evaluating
from vestige.weights.rows import logits_of

__all__ = ["Eraser", "Trace", "Work"]

HELD_OUT = 0.1
"""Share of the retain set that is held out where no held-out set is given."""


@dataclass(eq=False)
class Trace:
    """What an erasure did.

    Attributes:
        method: the eraser's spec.
        report: what it chose and found, in plain types.
        history: scores along the way; ``step``, ``forget_loss``, ``forget_accuracy``, ``held_out_loss``,
            ``held_out_accuracy`` (losses in nats per label); empty for erasers that do not look.
        stopped: why it ended: ``"finished"``, ``"target"`` (enough is forgotten) or ``"over-forgetting"``.
        seconds: how long it took.
    """

    method: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = "finished"
    seconds: float = 0.0
    _patch: Patch | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held for :meth:`undo`: the weights as they were."""
        held = () if self._patch is None else self._patch._changes
        return sum(change._before.nbytes for change in held)  # type: ignore[attr-defined]

    def undo(self) -> None:
        """Give the model its old weights back, bit for bit; a second call does nothing.

        Raises:
            PatchError: a later change to the same weights must be undone first.
        """
        if self._patch is not None:
            self._patch.undo()
            self._patch = None


@dataclass
class Work:
    """One erasure: the model, the examples, and the operations that erasers share.

    Attributes:
        model: in evaluation mode while an eraser works, so that dropout and running statistics play no part.
        forget, retain, held_out: examples; held out are examples to keep that only stop rules look at.
        batch_size: rows at a time.
        seed: of all random numbers.
        parameters: the weights that may change, by name: those that require gradients.
    """

    model: nn.Module
    forget: Examples
    retain: Examples
    held_out: Examples
    reader: Reader
    batch_size: int
    seed: int
    parameters: dict[str, nn.Parameter]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def generator(self, use: int = 0) -> torch.Generator:
        """Random numbers of one use, the same every time."""
        return torch.Generator().manual_seed(self.seed + 7919 * use)

    def batches(self, examples: Examples, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Row]]:
        """Places of rows and the rows."""
        return examples.batches(self.batch_size, self.device, generator)

    def logits(self, batch: Row) -> Tensor:
        """The model's logits; it is not shown the labels.

        Raises:
            UnsupportedModelError: it has none, as it has no output layer.
        """
        outputs = self.model(**{key: value for key, value in batch.items() if key != "labels"})
        return logits_of(outputs, self.model)

    def losses(self, batch: Row, over: Any = "mean") -> Tensor:
        """Each row's negative log-likelihood (rows,)."""
        return row_losses(self.logits(batch), batch["labels"], self.reader.causal, over)

    def mean_gradient(self, examples: Examples) -> dict[str, Tensor]:
        """The gradient of the mean loss over all rows, streamed, in float32 or wider; zero for unused weights."""
        weights = list(self.parameters.values())
        total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in weights]
        for _, batch in self.batches(examples):
            loss = finite(self.losses(batch).sum() / len(examples), f"the loss on {examples.name}")
            for so_far, g in zip(total, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if g is not None:
                    so_far += g
        return dict(zip(self.parameters, total, strict=True))

    @torch.no_grad()
    def score(self, examples: Examples) -> tuple[float, float]:
        """Mean loss and accuracy over rows."""
        loss = right = 0.0
        for _, batch in self.batches(examples):
            logits, labels = self.logits(batch), batch["labels"]
            loss += row_losses(logits, labels, self.reader.causal).sum().item()
            right += row_accuracy(logits, labels, self.reader.causal).sum().item()
        finite(torch.tensor(loss), f"the loss on {examples.name}")
        return loss / len(examples), right / len(examples)

    def scores(self) -> dict[str, float]:
        """How the forget set and the held-out set do now."""
        forget, held_out = self.score(self.forget), self.score(self.held_out)
        names = ("forget_loss", "forget_accuracy", "held_out_loss", "held_out_accuracy")
        return dict(zip(names, (*forget, *held_out), strict=True))


class Eraser(Method):
    """A way to take the influence of examples out of a model's weights.

    Class attributes
        holds_out: whether the eraser looks at held-out examples to know when to stop.
    """

    holds_out: ClassVar[bool] = False

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
    ) -> Trace:
        """Change the model's weights in place so that it is as if it had never seen ``forget``.

        Only weights that require gradients change: of a model with a PEFT adapter the adapter alone, which can be
        saved and switched off. Whatever goes wrong, the model is then as it was.

        Args:
            model: a classifier of rows or of tokens, or a causal language model, whose outputs have ``logits``.
            forget: examples to forget: a map-style dataset of mappings with ``labels`` as the model takes them, or of
                ``(input, label)`` pairs. Language models' labels may be left out: they are the tokens then.
            retain: examples to keep, likewise.
            held_out: further examples to keep, by which over-forgetting is told; if ``None``, erasers that need them
                hold out a tenth of ``retain``.
            batch_size: rows at a time.
            collate: puts rows (mappings of tensors) together; if ``None`` they are stacked, and token ids padded on
                the right.
            seed: of orders and draws.

        Raises:
            InputError: a set is empty, forget and kept examples overlap, or labels are out of range.
            UnsupportedModelError: an encoder-decoder model, or one without weights that require gradients.
            TrainingError: a loss is not a finite number.
        """
        work = self._work(model, forget, retain, held_out, batch_size, collate, seed)
        return self._carry_out(work, lambda patch, trace: self._apply(work, patch, trace))

    def _apply(self, work: Work, patch: Patch, trace: Trace) -> None:
        """Change the weights through the patch, and say in the trace what was done."""
        raise NotImplementedError

    def _work(
        self,
        model: nn.Module,
        forget: Any,
        retain: Any,
        held_out: Any,
        batch_size: int,
        collate: Collate | None,
        seed: int,
    ) -> Work:
        if not isinstance(model, nn.Module):
            raise InputError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
        if type(batch_size) is not int or batch_size < 1:
            raise SpecError(f"parameter 'batch_size' is {batch_size!r}; allowed: a whole number >= 1")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise UnsupportedModelError(f"{type(model).__name__} has no weights that require gradients")
        reader = Reader.of(model, collate)
        gone, kept = Examples(forget, "forget", reader), Examples(retain, "retain", reader)
        sets = [kept] if held_out is None else [kept, Examples(held_out, "held_out", reader)]
        disjoint(gone, *sets)
        if held_out is not None:
            aside = sets[1]
        elif self.holds_out:
            kept, aside = kept.split(HELD_OUT, seed)
        else:
            aside = kept
        return Work(model, gone, kept, aside, reader, batch_size, seed, parameters)

    def _carry_out(self, work: Work, change: Callable[[Patch, Trace], None]) -> Trace:
        began = time.perf_counter()
        patch = Patch(work.model, self.name)
        trace = Trace(self.spec(), _patch=patch)
        with patch.building(), evaluating(work.model, gradients=True):
            change(patch, trace)
        trace.seconds = time.perf_counter() - began
        return trace


def finite(value: Tensor, what: str) -> Tensor:
    """The value, if all of it is finite.

    Raises:
        TrainingError: it is not; the model is given its old weights back.
    """
    if not bool(value.isfinite().all()):
        raise TrainingError(f"{what} is not a finite number; the model is as it was before the erasure")
    return value
