"""A collator for rows of tokens that differ in length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vestige.weights.rows import IGNORED

__all__ = ["PadTokens"]


class PadTokens:
    """Puts rows of ``input_ids`` and ``labels`` together, filled up on the right, with an attention mask.

    Args:
        padding: the token id that fills up.
    """

    def __init__(self, padding: int = 0) -> None:
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"])) for row in rows]
        masks = [
            torch.as_tensor(row.get("attention_mask", torch.ones_like(i))) for row, i in zip(rows, ids, strict=True)
        ]
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.padding),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad(masks, batch_first=True),
        }
