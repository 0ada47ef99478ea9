"""Teach random answers to what is to be forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError
from vestige.weights.erase.descent import Descent
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Row
from vestige.weights.erase.losses import row_losses
from vestige.weights.rows import IGNORED

__all__ = ["RandomLabelForgetting", "random_labels"]


class RandomLabelForgetting(Descent):
    """Train on the forget set with labels drawn at random, once for each example, and on the retain set as it is.

    Of a language model every token that counts is given another token of the vocabulary.
    """

    name = "random-label-forgetting"
    paper = Paper(
        title="Unforgettable Generalization in Language Models",
        year=2024,
        arxiv="2409.02228",
        venue="COLM 2024",
        equations="fine-tuning on randomised labels, section 2",
    )
    verdict = Verdict(
        "reproduced",
        "class 3 of scikit-learn's digits, small ViT, 3 seeds, random labels on half of its rows: accuracy on unseen "
        "rows 0.92-1.00 -> 0.02-0.07, on the other digits 0.91-0.94; a linear probe reads it as before (0.90-0.98), as "
        "it does from a model that never saw it (0.92-0.94); the tasks of a language model were not looked at",
    )

    different: bool = param(True, "whether the label drawn is never the true one")

    def prepare(self, work: Work) -> int:
        """How many labels there are to draw from."""
        classes = work.reader.classes
        if classes is None:
            _, batch = next(work.batches(work.forget))
            with torch.no_grad():
                classes = work.logits(batch).shape[-1]
        if classes < 2:
            raise InputError(f"the model knows {classes} label; another cannot be drawn")
        return classes

    def forget_loss(self, work: Work, places: Tensor, batch: Row, known: Any) -> Tensor:
        rows = zip(batch["labels"].cpu(), places.tolist(), strict=True)
        drawn = torch.stack([random_labels(row, known, self.different, work.seed, place) for row, place in rows])
        return row_losses(work.logits(batch), drawn.to(work.device), work.reader.causal).mean()


def random_labels(labels: Tensor, classes: int, different: bool, seed: int, place: int) -> Tensor:
    """Labels in place of a row's, of the same shape, the same for each call; what is ignored stays so.

    Args:
        labels: of one row: one number, or one per token.
        classes: how many labels there are.
        different: whether the true label is left out.
        seed, place: of the run, and of the row in the forget set.
    """
    draw = torch.Generator().manual_seed(1_000_003 * seed + place)
    counts = labels != IGNORED
    drawn = labels.clone()
    if different:  # a step of 1 to classes - 1 around the circle of labels
        steps = torch.randint(1, classes, (int(counts.sum()),), generator=draw)
        drawn[counts] = (labels[counts] + steps) % classes
    else:
        drawn[counts] = torch.randint(classes, (int(counts.sum()),), generator=draw)
    return drawn
