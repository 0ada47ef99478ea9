"""Ragged layers: the flat layout, attention over it, and what beams, forks and growth do to it."""

from __future__ import annotations

import pytest
import torch

from vestige.context.attention import Look
from vestige.context.cache import KeptCache
from vestige.context.evict.h2o import H2O
from vestige.context.layer import EMPTY, KeptLayer, Step
from vestige.context.plan.adaptive import Adaptive
from vestige.context.plan.windows import ALL
from vestige.context.policy import Ranking
from vestige.context.ragged import RaggedLayer, Segments
from vestige.context.ragged_attention import StandIn, attend_ragged
from vestige.errors import InputError
from vestige.evidence.certify.caching import feed, held_bytes

ROWS, HEADS, GROUP, SLOTS, DIM = 2, 3, 2, 11, 5


class Rule(Ranking):
    """Heads with budgets by a list, the newest kept: a policy of tests, which is not registered."""

    by_age = True

    def check(self) -> None:
        pass

    def score(self, entries):
        return entries._positions(entries.slots).float()

    def budget_tokens(self, seen):
        return seen

    def head_budgets(self, real, layer):
        return [[4, 9, ALL] for _ in real]


IN_USE = []  # layers do not hold the cache that they are part of


@pytest.fixture(autouse=True)
def caches_in_use():
    yield
    IN_USE.clear()


def dense(policy=None, seed=0, seen=SLOTS):
    """A layer of a cache, with one entry missing here and there."""
    draw = torch.Generator().manual_seed(seed)
    cache = KeptCache(policy or Rule(), 1)
    layer: KeptLayer = cache.layers[0]
    keys, values = (torch.randn(ROWS, HEADS, SLOTS, DIM, dtype=torch.float64, generator=draw) for _ in range(2))
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.seen = keys, values, seen
    layer.positions = torch.arange(SLOTS, dtype=torch.int32).repeat(ROWS, HEADS, 1)
    layer.state = {"mass": torch.rand(ROWS, HEADS, SLOTS, dtype=torch.float64, generator=draw)}
    cache.real = [seen] * ROWS
    kept = torch.rand(ROWS, HEADS, SLOTS, generator=draw) < torch.tensor([0.3, 0.6, 0.9])[:, None]
    kept[..., -1] = True
    IN_USE.append(cache)
    return layer, kept


def packed(**given):
    layer, kept = dense(**given)
    counts = kept.sum(dim=2).flatten().tolist()
    ragged = RaggedLayer.pack(layer, kept, counts, [SLOTS] * ROWS)
    layer.cache.layers[0] = ragged
    return layer, kept, ragged


def one(cache, allowed=None):
    """A decoding step of one token per row."""
    cache.real = [real + 1 for real in cache.real]
    seen = cache.layers[0].seen
    step = Step(1, seen, None, torch.zeros(1), [1] * ROWS, list(cache.real), allowed and [allowed] * ROWS, 1)
    cache.step = step
    return step


def entry(seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HEADS, 1, DIM, dtype=torch.float64, generator=draw)


def held(layer):
    """What each head holds: {position: (key, value)}."""
    entries = layer.entries
    positions = entries._positions(entries.slots)
    return [
        [
            {
                int(p): (entries.keys[r, h, s].tolist(), entries.values[r, h, s].tolist())
                for s, p in enumerate(row)
                if p >= 0
            }
            for h, row in enumerate(positions[r])
        ]
        for r in range(positions.shape[0])
    ]


def test_segments_of_one_size_lie_side_by_side():
    segments = Segments((5, 2, 5, 2, 7))
    assert segments.order == (1, 3, 0, 2, 4)
    assert segments.offsets == (4, 0, 9, 2, 14)
    assert [(run.first, run.begin, run.size, run.heads) for run in segments.runs] == [
        (0, 0, 2, (1, 3)),
        (2, 4, 5, (0, 2)),
        (4, 14, 7, (4,)),
    ]
    flat = torch.arange(segments.total)
    assert segments.runs[1].of(flat).tolist() == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
    assert segments.total == 21


def test_packing_keeps_what_is_kept_and_nothing_else():
    layer, kept, ragged = packed()
    assert ragged.keys.shape == (int(kept.sum()), DIM)
    assert ragged.lengths.tolist() == kept.sum(dim=2).flatten().tolist()
    assert ragged.offsets.dtype == ragged.lengths.dtype == ragged.positions.dtype == torch.int32
    for row in range(ROWS):
        for head in range(HEADS):
            begin = int(ragged.offsets[row * HEADS + head])
            mine = slice(begin, begin + int(ragged.lengths[row * HEADS + head]))
            where = kept[row, head]
            assert torch.equal(ragged.keys[mine], layer.keys[row, head, where])
            assert torch.equal(ragged.values[mine], layer.values[row, head, where])
            assert torch.equal(ragged.positions[mine], layer.positions[row, head, where])
            assert torch.equal(ragged.state["mass"][mine], layer.state["mass"][row, head, where])


def test_policies_see_the_heads_side_by_side_and_may_write_to_them():
    layer, kept, ragged = packed()
    entries = ragged.entries
    assert entries.slots == int(kept.sum(dim=2).max())
    assert torch.equal(entries.valid(), entries.positions != EMPTY)
    entries.state["mass"] = entries.state["mass"] + 1
    entries.state["age"] = torch.ones_like(entries.state["mass"])
    entries.commit()
    for row in range(ROWS):
        for head in range(HEADS):
            count = int(kept[row, head].sum())
            assert torch.equal(
                ragged.entries.state["mass"][row, head, :count], layer.state["mass"][row, head, kept[row, head]] + 1
            )
    assert ragged.state["age"].sum() == kept.sum()


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("softcap", "window", "standing"),
    [(None, None, False), (3.0, None, False), (None, 6, False), (3.0, 6, False), (None, None, True)],
)
def test_attention_is_that_over_the_kept_entries(weights, softcap, window, standing):
    layer, kept, ragged = packed()
    draw = torch.Generator().manual_seed(3)
    query = torch.randn(ROWS, HEADS * GROUP, 1, DIM, dtype=torch.float64, generator=draw)
    other = [torch.randn(ROWS, HEADS, DIM, dtype=torch.float64, generator=draw) for _ in range(2)]
    weight = torch.tensor([[2.0, float("-inf"), 0.5]] * ROWS, dtype=torch.float64)
    received = {}

    class Looking(Rule):
        needs_attention = weights

        def receive(self, entries, share, step):
            received["share"] = share

        def stand_in(self, entries):
            return StandIn(*other, weight) if standing else None

    policy = Looking()
    step = Step(1, SLOTS, None, torch.zeros(1), [1] * ROWS, [SLOTS] * ROWS, None, 1)
    look = Look(query, 0.7, softcap, window)
    mine = attend_ragged(torch.nn.Module(), look, ragged, policy, step)
    for row in range(ROWS):
        for head in range(HEADS * GROUP):
            where = kept[row, head // GROUP].clone()
            if window is not None:
                where &= layer.positions[row, head // GROUP] >= SLOTS - window
            logits = 0.7 * layer.keys[row, head // GROUP, where] @ query[row, head, 0]
            values = layer.values[row, head // GROUP, where]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if standing:
                extra = 0.7 * other[0][row, head // GROUP] @ query[row, head, 0] + weight[row, head // GROUP]
                logits, values = (
                    torch.cat([logits, extra[None]]),
                    torch.cat([values, other[1][row, head // GROUP][None]]),
                )
            share = logits.softmax(dim=0)
            assert torch.allclose(mine[row, 0, head], share @ values, atol=1e-12)
            if weights:
                seen = received["share"][row, head // GROUP, head % GROUP]
                assert torch.allclose(seen[seen > 0].sum(), share[: int(where.sum())].sum(), atol=1e-9)


def test_heads_at_their_budget_replace_the_oldest_and_others_grow_without_copying_each_time():
    _, _, ragged = packed()
    cache, policy = ragged.cache, ragged.cache.policy
    before, moves = held(ragged), 0
    for number in range(60):
        step = one(cache, allowed=ALL)
        layer = cache.layers[0]
        place = layer.keys.data_ptr()
        layer.update(entry(number), entry(100 + number))
        moves += cache.layers[0].keys.data_ptr() != place
        assert policy is cache.policy and step.decoding
    after = held(cache.layers[0])
    assert moves <= 6
    for row in range(ROWS):
        assert len(after[row][0]) <= 4 and len(after[row][1]) <= 9
        assert sorted(after[row][0]) == list(range(SLOTS + 56, SLOTS + 60))
        everything = before[row][2].keys() | set(range(SLOTS, SLOTS + 60))
        assert after[row][2].keys() == everything
        for position, states in before[row][2].items():
            assert after[row][2][position] == states
        number = 37
        assert after[row][2][SLOTS + number][0] == entry(number)[row, 2, 0].tolist()


def test_a_frozen_cache_lets_every_head_grow():
    _, kept, ragged = packed()
    counts = kept.sum(dim=2).flatten().tolist()
    for number in range(5):
        one(ragged.cache, allowed=None)
        ragged.cache.layers[0].update(entry(number), entry(number))
    assert ragged.cache.layers[0].lengths.tolist() == [count + 5 for count in counts]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([False, True])), [1]),
    ],
)
def test_rows_move_as_wholes(change, rows):
    _, _, ragged = packed()
    ragged.aside = {"mean": torch.arange(float(ROWS))}
    before = held(ragged)
    change(ragged)
    assert held(ragged) == [before[row] for row in rows]
    assert ragged.aside["mean"].tolist() == [float(row) for row in rows]
    assert len(ragged.granted) == len(rows) * HEADS and len(ragged.granted_of) == len(rows)


def test_a_fork_shares_nothing():
    _, _, ragged = packed()
    cache = ragged.cache
    twin = cache.fork()
    before = held(cache.layers[0])
    assert held_bytes([cache, twin]) == held_bytes(cache) + held_bytes(twin)
    one(twin, allowed=None)
    twin.layers[0].update(entry(1), entry(2))
    assert held(cache.layers[0]) == before


def test_a_ragged_layer_cannot_be_rolled_back_but_starts_anew(llama):
    _, _, ragged = packed()
    ragged.crop(SLOTS)
    with pytest.raises(InputError, match="rolled back"):
        ragged.crop(-2)
    tokens = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with Adaptive(policy=H2O(budget=8), safeguard=0.0).attach(llama) as kept, torch.no_grad():
        cache = kept.new_cache()
        first = feed(llama, tokens, [20, 1, 1], cache)
        assert any(isinstance(layer, RaggedLayer) for layer in cache.layers)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        again = feed(llama, tokens, [20, 1, 1], cache)
    assert again.kept == first.kept and torch.equal(again.last, first.last)


def test_layers_whose_heads_are_equal_stay_dense(llama):
    tokens = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(0))
    with Adaptive(policy=H2O(budget=8), safeguard=1.0).attach(llama) as kept, torch.no_grad():
        cache = kept.new_cache()
        feed(llama, tokens, [20, 1, 1], cache)
    assert all(type(layer) is KeptLayer for layer in cache.layers)


def test_generation_with_beams_goes_through_ragged_layers(llama):
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with Adaptive(policy=H2O(budget=8), safeguard=0.0).attach(llama) as kept:
        found = llama.generate(
            tokens, attention_mask=mask, num_beams=3, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        assert found.shape == (2, 30)
        assert any(isinstance(layer, RaggedLayer) for layer in kept.cache.layers)
        most = max(int((kept.positions(layer) >= 0).sum(dim=(1, 2)).max()) for layer in range(2))
    assert most == 8 * 3
