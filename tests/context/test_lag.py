"""Dropping every few steps only: how much is held in between."""

from __future__ import annotations

import pytest
import torch

import vestige
from vestige.models.tiny import tiny_model

BUDGET, LAG = 10, 4


def held_after_each_step(policy, lengths, steps):
    """``(steps + 1, rows)`` entries held, after the prompt and after each step, by every head alike."""
    model = tiny_model("llama", torch.float64)
    width = max(lengths)
    tokens = torch.randint(3, 97, (len(lengths), width + steps), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    counts = []
    with policy.attach(model) as kept, torch.no_grad():
        cache = kept.new_cache()
        for start, end in [(0, width)] + [(width + n, width + n + 1) for n in range(steps)]:
            model(tokens[:, start:end], past_key_values=cache, attention_mask=mask[:, :end])
            held = (cache.positions(0) >= 0).sum(dim=2)
            assert bool((held == held[:, :1]).all())
            counts.append(held[:, 0].tolist())
    return counts


@pytest.mark.parametrize("name", ["h2o", "tova", "knorm", "streaming-llm"])
def test_entries_swing_between_budget_and_budget_plus_lag(name):
    policy = vestige.method(name, budget=BUDGET, lag=LAG, recent=2)
    counts = held_after_each_step(policy, [20], 10)
    assert [row[0] for row in counts] == [10, 11, 12, 13, 10, 11, 12, 13, 10, 11, 12]


def test_rows_are_cut_on_the_same_step_each_to_its_own():
    policy = vestige.method("h2o", budget=BUDGET, lag=LAG, recent=2)
    counts = held_after_each_step(policy, [20, 3, 9], 9)
    assert counts == [
        [10, 3, 9],
        [11, 4, 10],
        [12, 5, 11],
        [13, 6, 12],
        [10, 7, 10],
        [11, 8, 11],
        [12, 9, 12],
        [13, 10, 13],
        [10, 10, 10],
        [11, 11, 11],
    ]


def test_shares_grow_while_they_wait():
    policy = vestige.method("h2o", budget=0.5, lag=3, recent=2)
    counts = held_after_each_step(policy, [20, 7], 6)
    assert counts == [[10, 4], [11, 5], [12, 6], [12, 5], [13, 6], [14, 7], [13, 7]]


def test_with_a_lag_of_one_nothing_is_held_beyond_the_budget():
    counts = held_after_each_step(vestige.method("h2o", budget=BUDGET, lag=1), [20, 4], 8)
    assert max(max(row) for row in counts) == BUDGET
