"""What a model says of each row of a set, and how far that tells rows that it was trained on from others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from vestige.errors import InputError
from vestige.evidence.statistics import Interval, bootstrap
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Examples
from vestige.weights.erase.losses import aligned
from vestige.weights.rows import IGNORED

__all__ = ["RowScores", "exposure", "row_scores"]

DRAWS = 1000  # of the bootstrap
RARE = 0.2
"""Share of a row's tokens, those least expected, by which Min-K% tells members from others."""


@dataclass(frozen=True)
class RowScores:
    """Of each row of a set, over its labels (one, or one per token that counts):

    Attributes:
        loss: mean negative log-likelihood, in nats.
        right: share that has the highest logit.
        recited: share before the first that has not: how far greedy decoding goes on verbatim from the prompt.
        rare: mean negative log-likelihood of the least expected fifth.
    """

    loss: Float[np.ndarray, " rows"]
    right: Float[np.ndarray, " rows"]
    recited: Float[np.ndarray, " rows"]
    rare: Float[np.ndarray, " rows"]

    @property
    def accuracy(self) -> Interval:
        """The mean share of right labels with its 95% bootstrap interval."""
        return bootstrap(self.right.tolist())

    @property
    def verbatim(self) -> Interval:
        """The mean share that greedy decoding recites."""
        return bootstrap(self.recited.tolist())

    @property
    def likelihood(self) -> Interval:
        """The mean over rows of exp(-loss): the geometric mean probability of a row's labels."""
        return bootstrap(np.exp(-self.loss).tolist())


@torch.no_grad()
def row_scores(work: Work, examples: Examples) -> RowScores:
    """Look at every row once; the model must be in evaluation mode."""
    parts: list[list[np.ndarray]] = []
    for _, batch in work.batches(examples):
        logits, labels = aligned(work.logits(batch), batch["labels"], work.reader.causal)
        if labels.ndim == 1:
            logits, labels = logits[:, None], labels[:, None]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = labels != IGNORED
        number = counts.sum(1).clamp(min=1)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == labels) & counts
        unbroken = (right | ~counts).long().cumprod(1).bool() & counts
        ordered = losses.masked_fill(~counts, -math.inf).sort(1, descending=True).values
        taken = torch.arange(labels.shape[1], device=labels.device) < (RARE * number).ceil()[:, None]
        rare = ordered.masked_fill(~taken, 0.0).sum(1) / taken.sum(1)
        found = (losses.sum(1) / number, right.sum(1) / number, unbroken.sum(1) / number, rare)
        parts.append([value.double().cpu().numpy() for value in found])
    return RowScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def exposure(members: np.ndarray, others: np.ndarray) -> Interval:
    """How well a loss tells members from others: the area under the ROC curve, with a 95% bootstrap interval.

    1 where every member has a lower loss than every other row, 0.5 where nothing is told, below where members stand
    out by higher losses, which tells them as well.

    Args:
        members, others: losses of rows (n,) that were trained on, and of rows of the same kind that were not.

    Raises:
        InputError: one of both is empty.
    """
    if not len(members) or not len(others):
        raise InputError(f"exposure: {len(members)} members and {len(others)} others; allowed: one or more of both")
    wins = (members[:, None] < others).astype(float) + 0.5 * (members[:, None] == others)
    random = np.random.default_rng(0)
    areas = []
    for _ in range(DRAWS):
        rows = random.integers(len(members), size=len(members))
        columns = random.integers(len(others), size=len(others))
        areas.append(wins[rows].mean(0)[columns].mean())
    low, high = np.quantile(areas, [0.025, 0.975])
    return Interval(float(wins.mean()), float(low), float(high), len(members) + len(others))
