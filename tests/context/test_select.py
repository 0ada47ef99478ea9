"""Policies that keep all and read few: what is read, and that it is read from where it should be."""

from __future__ import annotations

import pytest
import torch

from vestige.context.select.recycled_attention import RecycledAttention
from vestige.errors import SpecError
from vestige.evidence.certify.caching import feed, reference_run
from vestige.evidence.references import recycled_attention as recycled_reference
from vestige.models.tiny import tiny_model

PROMPT, DECODED = 26, 14
CHUNKS = (PROMPT, *[1] * DECODED)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(policy, model, ids, chunks, mask=None):
    with policy.attach(model) as kept:
        return torch.cat(feed(model, ids, chunks, kept.new_cache(), mask).logits, dim=1)


def turned_rows(similarity: float) -> RecycledAttention:
    return RecycledAttention(budget=8, stride=2, similarity=similarity)


@pytest.mark.parametrize("similarity", [-1.0, 0.2, 0.6, 1.0])
def test_full_steps_come_where_queries_have_turned(similarity):
    model, ids = tiny_model("llama", torch.float64), tokens(1, PROMPT + DECODED)
    policy = turned_rows(similarity)
    due = reference_run(model, ids, CHUNKS, recycled_reference.simulate, policy)
    mine = logits(policy, model, ids, CHUNKS)
    assert (mine - torch.cat(due.logits, dim=1)).abs().max() < 1e-6


def test_rows_of_a_batch_decide_for_themselves():
    model, ids = tiny_model("llama", torch.float64), tokens(4, PROMPT + DECODED)
    policy, full_steps = turned_rows(0.4), []
    whole = policy._turned

    def noted(entries, look):
        full_steps.append(whole(entries, look))
        return full_steps[-1]

    object.__setattr__(policy, "_turned", noted)
    together = logits(policy, model, ids, CHUNKS)
    assert any(0 < int(rows.sum()) < 4 for rows in full_steps), "no step in which rows differ was tried"
    alone = torch.cat([logits(turned_rows(0.4), model, row[None], CHUNKS) for row in ids])
    assert (together - alone).abs().max() < 1e-6


def test_a_stride_of_one_is_full_attention():
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    assert (logits(RecycledAttention(budget=4, stride=1), model, ids, CHUNKS) - plain).abs().max() < 1e-6
    assert (logits(RecycledAttention(budget=4, stride=3), model, ids, CHUNKS) - plain).abs().max() > 1e-2


def test_a_partial_step_reads_the_budget_alone(monkeypatch):
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    read = []
    plain = RecycledAttention.read

    def noted(self, entries, look, step):
        reading = plain(self, entries, look, step)
        read.append((step.turn, reading.values.shape[2]))
        return reading

    monkeypatch.setattr(RecycledAttention, "read", noted)
    logits(RecycledAttention(budget=8, stride=5), model, ids, CHUNKS)
    for turn, entries in read:
        assert entries == (8 if turn % 5 else PROMPT + turn)


def test_a_smoothing_window_has_a_middle():
    with pytest.raises(SpecError, match="pool"):
        RecycledAttention(pool=4)
