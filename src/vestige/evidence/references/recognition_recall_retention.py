"""What Orhan 2023 (arXiv 2303.17557) measures, written out.

Recognition: a seen and an unseen text are compared; the answer is right where the seen one has the lower loss.
Recall: ROUGE-2, the F1 of pairs of neighbouring tokens, of what is said after a cue and what should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SMALL", "examples", "recognised", "rouge2"]

SMALL = {"items": 3, "longest": 10, "exposures": 2, "updates": (1,), "small_updates": 2, "small_hidden": 16}


def examples(chance: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Arguments to try the equations with."""
    return {
        "recognised": {"seen": chance.integers(0, 4, 5) / 1.0, "unseen": chance.integers(1, 6, 4) / 1.0},
        "rouge2": {"said": chance.integers(0, 3, 12).tolist(), "due": chance.integers(0, 3, 10).tolist()},
    }


def recognised(seen: Sequence[float], unseen: Sequence[float]) -> float:
    """Share of right answers over all pairs; a tie is a coin."""
    right = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a in seen for b in unseen)
    return right / (len(seen) * len(unseen))


def rouge2(said: Sequence[int], due: Sequence[int]) -> list[float]:
    """F1 of the pairs in common; each counts as often as it stands in both."""
    mine, theirs = ([(row[i], row[i + 1]) for i in range(len(row) - 1)] for row in (said, due))
    left, common = list(theirs), 0
    for pair in mine:
        if pair in left:
            left.remove(pair)
            common += 1
    if common == 0:
        return [0.0]
    precision, recall = common / len(mine), common / len(theirs)
    return [2 * precision * recall / (precision + recall)]
