"""What a row costs a model, and whether it answers it rightly: for labels of rows and labels of tokens alike."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.weights.rows import IGNORED

__all__ = ["aligned", "row_accuracy", "row_losses"]


def aligned(logits: Tensor, labels: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits and the labels that they predict: in a causal model those of the next token."""
    return (logits[:, :-1], labels[:, 1:]) if causal and labels.ndim == 2 else (logits, labels)


def row_losses(logits: Tensor, labels: Tensor, causal: bool, over: Literal["mean", "sum"] = "mean") -> Tensor:
    """The negative log-likelihood of each row's labels (rows,), in float32 or wider, in nats.

    Args:
        logits: (rows, classes), or (rows, tokens, classes).
        labels: (rows,), or (rows, tokens) with :data:`~vestige.weights.rows.IGNORED` where a token does not count.
        causal: whether logits at a token predict the label of the next.
        over: how the tokens of a row are put together.
    """
    logits, labels = aligned(logits, labels, causal)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
    return each if over == "sum" else each / (labels != IGNORED).sum(1).clamp(min=1)


def row_accuracy(logits: Tensor, labels: Tensor, causal: bool) -> Tensor:
    """The share of each row's labels that have the highest logit (rows,)."""
    logits, labels = aligned(logits, labels, causal)
    right = logits.argmax(-1) == labels
    if labels.ndim == 1:
        return right.float()
    counts = labels != IGNORED
    return (right & counts).sum(1) / counts.sum(1).clamp(min=1)
