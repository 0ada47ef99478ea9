"""The retrieval score of Wu et al. 2024 (arXiv 2404.15574, section 2), one head and one token at a time.

A head *h* copies the token *w* while *w* is generated if two things hold: *w* is a token of the answer in the
context (the needle's part *k* that the model has to repeat), and among all positions of the context, the one that
*h* gives the largest attention weight is a position of *k* that holds *w*. With *g* the positions so copied while the
whole answer is generated, the score is |g ∩ k| / |k|.

The authors' code adds 1/|k| at every step in which a token is copied, and so counts a position twice that is copied
twice; here, as in the paper's definition, *g* is a set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["SMALL", "retrieval_score"]

# Hyper-parameters with which the probe's prompts fit the small models.
SMALL = {"lengths": (110,), "depths": (0.2, 0.9), "seeds": (0, 1), "answers": ("number",), "batch": 2}


def retrieval_score(
    attention: Sequence[np.ndarray], generated: Sequence[int], context: Sequence[int], answer: range
) -> float:
    """Score of one head for one prompt.

    Args:
        attention: for each generated token, the head's attention weights over all positions so far, as they were
            when that token was predicted.
        generated: the tokens generated.
        context: the tokens of the prompt.
        answer: the positions in the context at which the answer's tokens stand.
    """
    copied = set()
    for weights, token in zip(attention, generated, strict=True):
        position = max(range(len(weights)), key=lambda i: np.float64(weights[i]))
        if position in answer and context[position] == token:
            copied.add(position)
    return len(copied) / len(answer)
