"""Keeping a state up to date, token by token."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.core.spec import param
from vestige.evidence.tasks.task import Batch, TrainingTask

__all__ = ["StateTracking"]

_SIZES = {"parity": 2, "S3": 3, "S4": 4, "S5": 5}


class StateTracking(TrainingTask):
    """Say after each token what all tokens so far come to.

    A token is a permutation, and so is the answer: the one that results if those so far are applied one after the
    other. ``parity`` has two of them, so the answer is whether the number of ones is odd. Composition in S5 cannot be
    done in a fixed number of layers by models whose state changes commute. Source: Merrill, Petty and Sabharwal (arXiv
    2404.08819), section 4.
    """

    name = "state-tracking"
    version = 1

    group: Literal["parity", "S3", "S4", "S5"] = param("parity", "parity, or all permutations of 3, 4 or 5 things")

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    @property
    def vocabulary(self) -> int:
        return math.factorial(_SIZES[self.group])

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(self.vocabulary, (rows, self.length), generator=generator)
        return Batch(tokens, running(tokens, composition(_SIZES[self.group])))


@functools.cache
def composition(size: int) -> Int[Tensor, "order order"]:
    """For permutations by their number: entry *a, b* is that of *a* first and then *b*; 0 changes nothing."""
    all_of_them = list(itertools.permutations(range(size)))
    number = {permutation: n for n, permutation in enumerate(all_of_them)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in all_of_them] for a in all_of_them])


def running(tokens: Int[Tensor, "rows length"], table: Int[Tensor, "order order"]) -> Int[Tensor, "rows length"]:
    """The composition of all tokens up to each, in as many steps as the length has binary digits."""
    state, reach = tokens, 1
    while reach < tokens.shape[1]:
        state = torch.cat([state[:, :reach], table[state[:, :-reach], state[:, reach:]]], 1)
        reach *= 2
    return state
