"""Scores of single methods against what can be worked out by hand, or by drawing many queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vestige
from vestige.context.attention import attend
from vestige.context.cache import KeptCache
from vestige.context.evict.lazy_eviction import LazyEviction
from vestige.errors import InputError, SpecError


class Bench:
    """One layer with a cache under a policy, fed with queries, keys and values by hand."""

    def __init__(self, policy):
        self.cache = KeptCache(policy, 1)
        self.layer = self.cache.layers[0]
        self.policy = policy

    def feed(self, query, key, value=None, scaling=1.0, mask=None):
        """``query (batch, heads, count, dim)``, ``key`` and ``value (batch, kv_heads, count, dim)``."""
        module = nn.Module()
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        self.cache.begin(query.shape[0], query.shape[2], mask, query.device)
        self.layer.update(key, key if value is None else value)
        attend(module, query, self.layer, scaling=scaling, policy=self.policy, step=self.cache.step, watchers=[])
        self.cache.step = None

    @property
    def score(self):
        return self.policy.score(self.layer)

    @property
    def positions(self):
        return self.cache.positions(0)[0, 0].tolist()


def method(name, **values):
    return vestige.method(name, **{"budget": 1.0, **values})


def test_tova_averages_over_all_heads_and_looks_at_the_last_query_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4)
    bench = Bench(method("tova"))
    bench.feed(query, key)
    logits = query[:, :, -1:] @ key.repeat_interleave(2, 1).transpose(-1, -2)
    due = logits.softmax(-1)[:, :, 0].mean(1)
    for head in range(3):
        ranks = bench.score[:, head].argsort(dim=-1)
        assert torch.equal(ranks, due.argsort(dim=-1))
    assert torch.equal(bench.score[:, 0], bench.score[:, 2])


def test_knorm_ranks_the_shortest_first_and_tells_bfloat16_keys_apart():
    key = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.5, 0.0]]).expand(1, 1, 3, 2)
    bench = Bench(method("knorm"))
    bench.feed(torch.zeros(1, 1, 3, 2), key)
    torch.testing.assert_close(bench.score[0, 0], -torch.tensor([3.0, math.sqrt(2), 0.5]))
    many = (1 + torch.rand(1, 1, 500, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    bench = Bench(method("knorm"))
    bench.feed(torch.zeros(1, 1, 500, 64, dtype=torch.bfloat16), many)
    assert bench.score.unique().numel() > 450


@pytest.mark.parametrize(
    ("pooling", "due"), [("average", [2 / 9, 2 / 9, 2 / 9, 1 / 9, 1 / 9]), ("max", [2 / 3] * 3 + [1 / 3] * 2)]
)
def test_snapkv_pools_votes_along_the_text(pooling, due):
    """The window's query looks at tokens 1 and 4 of 0 ... 5, at the one with twice the weight of the other."""
    key = torch.zeros(1, 1, 6, 2)
    key[0, 0, 1, 0], key[0, 0, 4, 0] = 40 + math.log(2), 40
    query = torch.zeros(1, 1, 6, 2)
    query[..., 0] = 1
    bench = Bench(method("snapkv", window_size=1, kernel_size=3, pooling=pooling))
    bench.feed(query, key)
    votes = bench.score[0, 0]
    torch.testing.assert_close(votes[:5], torch.tensor(due), atol=1e-4, rtol=0)
    assert votes[5] > votes[:5].max()


def test_snapkv_window_is_the_chunk_where_that_is_shorter():
    torch.manual_seed(1)
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4)
    short, exact = Bench(method("snapkv", window_size=64, kernel_size=1)), Bench(method("snapkv", window_size=3))
    for bench in (short, exact):
        bench.feed(query[:, :, :6], key[:, :, :6])
        bench.feed(query[:, :, 6:], key[:, :, 6:])
    assert bool((short.score == short.score.max()).all())  # nothing is before a window of 64
    assert bool((exact.score[..., :6] < exact.score[..., 6:].min()).all())


def test_snapkv_refuses_what_cannot_be():
    with pytest.raises(SpecError, match="kernel_size"):
        vestige.method("snapkv", kernel_size=4)
    with pytest.raises(SpecError, match=r"sinks \+ window_size = 68"):
        vestige.method("snapkv", budget=67, sinks=4)
    with pytest.raises(SpecError, match="when"):
        vestige.method("snapkv", when="both")


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_is_the_mean_over_many_gaussian_queries(covariance):
    """Without turns: the expected weights are those that fresh queries of the same distribution give on the mean."""
    torch.manual_seed(2)
    dim, count = 4, 4000
    mix = torch.randn(2, dim, dim, dtype=torch.float64) * 0.6
    mean = torch.randn(2, 1, dim, dtype=torch.float64)

    def draw():
        return mean + torch.randn(2, count, dim, dtype=torch.float64) @ mix

    key, value = torch.randn(2, 1, 1, count, dim, dtype=torch.float64) * 0.6
    bench = Bench(method("expected-attention", sinks=2, covariance=covariance))
    bench.feed(draw()[None], key, value, scaling=0.7)
    chosen = slice(2, 60)
    weight = (0.7 * draw() @ key[0, 0, 2:].T).exp().mean(dim=1)
    share = (weight / weight.sum(dim=-1, keepdim=True)).mean(dim=0)[: 60 - 2]
    due = share.log() + value[0, 0, chosen].norm(dim=-1).log()
    apart = float((bench.score[0, 0, chosen] - due).abs().mean())
    assert (apart < 0.1) == covariance, apart


def test_expected_attention_adds_up_its_statistics():
    """In one chunk, in several and token by token the same mean and covariance come out; padding counts nowhere."""
    torch.manual_seed(3)
    states = torch.randn(1, 2, 14, 4, dtype=torch.float64)
    scores = []
    for chunks in ([14], [6, 5, 3], [8, *[1] * 6]):
        bench = Bench(method("expected-attention", sinks=2))
        for part in states.split(chunks, dim=2):
            bench.feed(part, part[:, :1])
        scores.append(bench.score)
    pads = torch.cat([torch.full((1, 2, 3, 4), 7.0, dtype=torch.float64), states], dim=2)
    bench = Bench(method("expected-attention", sinks=2))
    mask = torch.ones(1, 17)
    mask[:, :3] = 0
    bench.feed(pads, pads[:, :1], mask=mask)
    scores.append(bench.score[..., 3:])
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], atol=1e-10, rtol=0)


def test_expected_attention_tells_hopeless_entries_apart():
    """In float32 shares far below the smallest number still rank."""
    key = torch.linspace(-30, 30, 40)[None, None, :, None] * torch.ones(4)
    bench = Bench(method("expected-attention", sinks=0, covariance=False))
    bench.feed(torch.ones(1, 1, 40, 4), key, torch.ones_like(key))
    assert bool((bench.score[0, 0].diff() > 0).all())


def lazily(rows, activity=0.1, **values):
    """Feed attention weights by hand: ``rows[t][j]`` is what entry *j* gets at step *t*."""
    policy = method("lazy-eviction", activity=activity, lag=4, budget=100, **values)
    bench = Bench(policy)
    bench.feed(torch.zeros(1, 1, len(rows[0]) - 1, 2), torch.zeros(1, 1, len(rows[0]) - 1, 2))
    for row in rows:
        bench.cache.begin(1, 1, None, torch.device("cpu"))
        new = torch.zeros(1, 1, 1, 2)
        bench.layer.update(new, new)
        policy.receive(bench.layer, torch.tensor(row)[None, None, None], bench.cache.step)
        bench.cache.step = None
    return bench


def test_lazy_eviction_counts_silence_and_the_longest_interval():
    bench = lazily([[0.5, 0.0, 0.2], [0.0, 0.0, 0.2, 0.0], [0.3, 0.0, 0.0, 0.0, 0.1], [0.05, 0.0, 0.3, 0.0, 0.0, 0.9]])
    state = bench.layer.state
    #                                        prompt   step 1  2  3  4
    assert state["silence"][0, 0].tolist() == [1, 4, 0, 3, 1, 0]
    assert state["longest"][0, 0].tolist() == [2, 0, 2, 0, 1, 1]


def test_lazy_eviction_suggests_a_lag_from_what_it_has_seen():
    bench = lazily([[0.5, 0.0, 0.2], [0.0, 0.0, 0.2, 0.0], [0.3, 0.0, 0.0, 0.0, 0.1], [0.05, 0.0, 0.3, 0.0, 0.0, 0.9]])
    assert [LazyEviction.suggest_lag(bench.cache, share) for share in (0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 2]
    with pytest.raises(InputError, match="decode some tokens"):
        LazyEviction.suggest_lag(Bench(method("lazy-eviction")).cache)


def test_lazy_eviction_ranks_by_its_score_and_equals_by_age():
    bench = lazily([[0.5, 0.0, 0.0, 0.2], [0.5, 0.0, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.1]])
    #    silence 1, longest 1: 2 s(-1) + 1 for 0 and 3; never active: 0 for 1, 2, 4; 0 and 1: 2 for 5
    assert bench.score[0, 0].tolist() == [3, 0, 1, 4, 2, 5]


def test_lazy_eviction_keeps_its_window_and_asks_for_room():
    policy = vestige.method("lazy-eviction", budget=300, lag=100, sinks=2)
    assert policy.recent_tokens(300) == 100
    assert policy.replace(recent=150).recent_tokens(300) == 150
    with pytest.raises(SpecError, match=r"sinks \+ lag = 104"):
        vestige.method("lazy-eviction", budget=103, lag=100, sinks=4)
