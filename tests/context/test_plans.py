"""Plans: budgets that differ between layers and heads, what is learnt of a model, and where it is found again."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vestige.context.evict.a2sf import A2SF
from vestige.context.evict.full import Full
from vestige.context.evict.h2o import H2O
from vestige.context.evict.lazy_eviction import LazyEviction
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.plan import windows
from vestige.context.plan.adaptive import Adaptive
from vestige.context.plan.duo_attention import DuoAttention
from vestige.context.plan.moa import MoA
from vestige.context.plan.passkeys import ORDINALS, Sample, copies, pass_keys
from vestige.context.plan.pyramid import Pyramid, pyramid
from vestige.context.plan.razor_attention import RazorAttention
from vestige.context.plan.rules import Program
from vestige.context.plan.sharing import apportion
from vestige.context.plan.windows import fingerprint, highest
from vestige.core.anatomy import Anatomy
from vestige.core.method import Method
from vestige.errors import InputError, SpecError
from vestige.evidence.certify.caching import feed, held_bytes
from vestige.models.tiny import tiny_model


def tokens(batch, length, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40)), min_size=1, max_size=9),
    st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_whole_numbers_add_up_and_keep_their_bounds(heads, total):
    wishes, most = [wish for wish, _ in heads], [cap for _, cap in heads]
    total = max(total, len(heads))
    given = apportion(wishes, total, most)
    assert sum(given) == min(total, sum(most))
    assert all(1 <= one <= cap for one, cap in zip(given, most, strict=True))
    if abs(sum(wishes) - total) < 1e-9 and all(1 <= wish <= cap for wish, cap in heads):
        assert all(abs(one - wish) < 1 + 1e-9 for one, wish in zip(given, wishes, strict=True))


@given(st.integers(2, 600), st.integers(1, 900), st.floats(0, 0.9), st.floats(1, 50), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_pyramid_falls_and_holds_exactly_the_budget(mean, more, part, beta, layers):
    fixed, seen = int(part * mean), mean + more
    budgets = pyramid(mean, seen, fixed, beta, layers)
    assert sum(budgets) == layers * mean
    assert all(lower >= upper for lower, upper in itertools.pairwise(budgets))
    assert max(budgets) <= seen and min(budgets) >= max(1, fixed)
    assert set(pyramid(mean, seen, fixed, 1.0, layers)) == {mean}


def test_a_pyramid_over_short_text_keeps_all_of_it():
    assert pyramid(20, 20, 4, 20.0, 6) == (20,) * 6


def test_plans_nest_and_come_back_from_their_spec():
    plan = Adaptive(policy=Pyramid(policy=A2SF(budget=0.25), beta=7.0), safeguard=0.5)
    assert Method.from_spec(plan.to_json()) == plan == Method.from_spec(json.loads(plan.to_json()))
    assert plan.spec()["policy"]["policy"]["name"] == "a2sf"
    assert plan.with_budget(64).policy.policy.budget == 64
    assert plan.sinks == 0 and plan.recent_tokens(40) == 20
    assert hash(plan) == hash(Method.from_spec(plan.to_yaml()))


@pytest.mark.parametrize("plan", [Adaptive, Pyramid])
@pytest.mark.parametrize("policy", ["full-size", StreamingLLM(), DuoAttention()])
def test_policies_that_cannot_be_planned(plan, policy):
    with pytest.raises(SpecError, match="policy"):
        plan(policy=policy)


def test_scores_that_cannot_be_compared_share_nothing_out():
    for policy in (LazyEviction(), Pyramid(policy=LazyEviction())):
        with pytest.raises(SpecError, match=r"compared"):
            Adaptive(policy=policy)


def test_full_under_a_plan_is_the_model_alone(llama):
    with torch.no_grad():
        alone = llama(tokens(1, 20)).logits
        with Pyramid(policy=Full()).attach(llama):
            assert torch.equal(llama(tokens(1, 20)).logits, alone)


def test_heads_that_look_widely_get_more():
    rank = torch.full((1, 2, 12), 0.01)
    rank[0, 0] = torch.linspace(0.5, 0.6, 12)  # everything matters
    rank[0, 1, 3] = 1.0  # one entry does
    assert Adaptive(policy=H2O(), safeguard=0.0).share_out(rank, [4]).tolist() == [[7, 1]]
    assert Adaptive(policy=H2O(), safeguard=0.5).share_out(rank, [4]).tolist() == [[6, 2]]
    assert Adaptive(policy=H2O(), safeguard=1.0).share_out(rank, [4]) is None
    assert Adaptive(policy=H2O(), safeguard=0.0).share_out(rank, [12]) is None
    several = Adaptive(policy=H2O(), safeguard=0.0).share_out(rank.repeat(2, 1, 1), [4, 12])
    assert several.tolist() == [[7, 1], [12, 12]]


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_no_shares_of_one_total_keep_more_of_the_scores(seed, budget):
    rank = torch.rand(1, 3, 10, generator=torch.Generator().manual_seed(seed)) ** 4
    shares = Adaptive(policy=H2O(), safeguard=0.0).share_out(rank, [budget])
    mine = [budget] * 3 if shares is None else shares[0].tolist()
    assert sum(mine) == 3 * budget

    def kept(counts):
        return sum(float(rank[0, head].topk(count).values.sum()) for head, count in enumerate(counts))

    others = (c for c in itertools.product(range(1, 11), repeat=3) if sum(c) == 3 * budget)
    assert kept(mine) >= max(map(kept, others)) - 1e-6


class Words:
    """A tokenizer that knows words and line ends."""

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True):
        pieces = text.replace("\n", " \n ").replace(".", " .").split(" ")
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces if piece]}

    def text(self, ids):
        back = {number: piece for piece, number in self.known.items()}
        return " ".join(back[number] for number in ids)


def test_pass_keys_are_hidden_once_and_asked_for_at_the_end():
    words = Words()
    samples = list(itertools.islice(pass_keys(words, [400, 300], keys=3, words=4, seed=5), 6))
    assert {len(sample.ids) for sample in samples} == {300, 400}
    for sample in samples:
        text = words.text(sample.ids)
        asked = [i for i, counts in enumerate(sample.counts) if counts]
        for name in ORDINALS[:3]:
            hidden, answer = text.split(f"the {name} pass key is ")[1:]
            assert hidden.split(" .")[0] == answer.split(" .")[0] and len(hidden.split(" .")[0].split()) == 4
        assert len(asked) == 3 * 5 and min(asked) > len(sample.ids) - 3 * 40
    again = list(itertools.islice(pass_keys(words, [400, 300], keys=3, words=4, seed=5), 6))
    assert samples == again
    assert samples != list(itertools.islice(pass_keys(words, [400, 300], keys=3, words=4, seed=6), 6))


def test_texts_that_cannot_be_written():
    with pytest.raises(InputError, match="40 tokens is too short"):
        pass_keys(Words(), [400, 40])
    with pytest.raises(SpecError, match="keys"):
        pass_keys(Words(), [400], keys=11)
    with pytest.raises(InputError, match="no token counts"):
        Sample((1, 2, 3), (True, False, False))
    with pytest.raises(InputError, match="3 tokens and 2"):
        Sample((1, 2, 3), (True, False))
    with pytest.raises(InputError, match="too short to repeat"):
        copies(range(9), 12, 1, copied=8)


def test_with_all_gates_open_nothing_is_lost(llama64):
    from vestige.context.plan.distil import GatedAttention, _losses
    from vestige.core.patch import Patch

    anatomy, (sample,) = Anatomy.of(llama64), copies(range(3, 97), 40, 1)
    attention = GatedAttention(2, 3)
    losses = []
    with Patch(llama64, "test") as patch:
        patch.attention("vestige-test-gates", attention)
        for gate in (1.0, 0.5, 0.0):
            gates = torch.full((2, 3), gate, dtype=torch.float64)
            losses.append([part.item() for part in _losses(anatomy, attention, gates, sample)])
    assert losses[0][0] < 1e-12 and losses[0][1] == 1.0
    assert losses[1][0] > 1e-4 and losses[2][0] > losses[1][0]


def test_an_interrupted_training_goes_on_where_it_was(llama, tmp_path):
    how = {"samples": copies(range(3, 97), 40, 3), "steps": 20, "learning_rate": 0.1}
    small = {"sinks": 2, "recent": 3}
    whole = DuoAttention.fit(llama, parameters=small, **how)

    def stop(done, of):
        if done == 13:
            raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        DuoAttention.fit(llama, parameters=small, checkpoint=path, progress=stop, **how)
    seen = []
    again = DuoAttention.fit(
        llama, parameters=small, checkpoint=path, progress=lambda d, of: seen.append((d, of)), **how
    )
    assert seen == [(done, 20) for done in range(11, 21)]
    assert again == whole and 0 < sum(map(sum, whole.gates)) < 6
    with pytest.raises(InputError, match="another training"):
        DuoAttention.fit(llama, parameters={**small, "recent": 4}, checkpoint=path, **how)
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        DuoAttention.fit(llama, parameters=small, checkpoint=path, **how)


def test_the_highest_gates_over_the_whole_model_keep_everything():
    gates = ((0.9, 0.1), (0.5, 0.5), (0.2, 1.0))
    assert highest(gates, 0.5) == ((True, False), (True, False), (False, True))
    assert highest(gates, 0.0) == ((False, False),) * 3 and highest(gates, 1.0) == ((True, True),) * 3


def test_plans_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))
    monkeypatch.setattr(windows, "_remembered", {})
    model = tiny_model("llama", torch.float32, seed=11)
    with pytest.raises(SpecError, match=r"DuoAttention\.fit"):
        DuoAttention().attach(model)
    gates = ((0.9, 0.1, 0.2), (0.5, 0.5, 0.5))
    plan = DuoAttention(gates=gates, fitted_on=fingerprint(Anatomy.of(model)), sinks=2, recent=3)
    with plan.attach(model) as kept:
        assert kept.policy == plan
    path = plan.save()
    assert path.parent == tmp_path / "plans" / "duo-attention"
    with DuoAttention(share=0.25).attach(model) as kept:  # tables from the file, the rest as asked
        assert kept.policy == DuoAttention(gates=gates, fitted_on=plan.fitted_on, share=0.25)
    path.unlink()
    plan.replace(gates=tuple(row[::-1] for row in gates)).remember()
    with DuoAttention().attach(model) as kept:
        assert kept.policy.gates[0] == (0.2, 0.1, 0.9)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert fingerprint(Anatomy.of(tiny_model("llama", dtype, seed=11))) == plan.fitted_on


def test_razor_finds_its_heads_when_it_is_attached(monkeypatch):
    monkeypatch.setattr(windows, "_remembered", {})
    model = tiny_model("gpt2", torch.float32, seed=12)
    with RazorAttention(recent=3).attach(model) as kept:
        found = kept.policy
    assert found.fitted and found.recent == 3 and found.fitted_on == fingerprint(Anatomy.of(model))
    with RazorAttention().attach(model) as kept:
        assert kept.policy.induction == found.induction


def test_what_is_dropped_is_counted_and_its_mean_kept(llama64):
    plan = RazorAttention(
        induction=((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        echo=((0.0,) * 3,) * 2,
        fitted_on=fingerprint(Anatomy.of(llama64)),
        induction_share=1 / 6,
        echo_share=0.0,
        sinks=2,
        recent=4,
        compression=100.0,
    )
    given = tokens(2, 30, seed=4)
    with Full().attach(llama64) as kept, torch.no_grad():
        whole = kept.new_cache()
        feed(llama64, given[:, :20], [20], whole)
    with plan.attach(llama64) as kept, torch.no_grad():
        cache = kept.new_cache()
        feed(llama64, given, [20, *[1] * 10], cache)
        first = cache.layers[0]
        assert first.aside["dropped"].tolist() == [[0, 24, 24]] * 2
        assert plan.stand_in(first).weight[:, 0].tolist() == [float("-inf")] * 2
        assert cache.nbytes == held_bytes(cache)
    with plan.attach(llama64) as kept, torch.no_grad():
        cache = kept.new_cache()
        feed(llama64, given[:, :20], [20], cache)
        mean = cache.layers[0].aside["mean_key"][:, 1]
    assert torch.allclose(mean, whole.layers[0].keys[:, 1, 2:16].mean(dim=1), atol=1e-12)


def profiles(lengths=(16, 32), layers=2, heads=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(layers, heads, n, generator=draw) ** 4 / (1 + torch.arange(n)) for n in lengths}


@pytest.mark.parametrize("density", [0.35, 0.5, 0.8])
def test_chosen_rules_keep_the_density_at_every_length(density):
    program = Program.of(MoA(density=density, sinks=1, recent=2), profiles())
    rules = [rule for row in program.best() for rule in row]
    chosen = [program.rules.index(rule) for rule in rules]
    assert program.densities.shape[0] == 3  # the lengths profiled, and twice the longest
    assert (program.densities[:, chosen].mean(axis=1) <= density + 1e-9).all()
    if density < 0.8:  # what is allowed is used
        assert program.densities[:, chosen].mean(axis=1).max() > 0.85 * density


def test_more_density_loses_less():
    losses = []
    for density in (0.3, 0.45, 0.6, 0.9):
        program = Program.of(MoA(density=density, sinks=1, recent=2), profiles())
        plan = program.solve(sum(program.losses))
        losses.append(sum(program._losses_of(plan)))
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]


def test_bounds_and_rules_per_layer_are_kept():
    free = Program.of(MoA(density=0.4, sinks=1, recent=2), profiles(heads=4))
    alone = free._losses_of(free.solve(free.losses[1]))
    bound = 0.5 * (alone[0] + free._losses_of(free.solve(free.losses[0]))[0])
    plan = free.solve(free.losses[1], {0: bound})
    assert free._losses_of(plan)[0] <= bound * (1 + 1e-6)
    assert free.solve(free.losses[1], {0: 0.0}) is None
    tied = Program.of(MoA(density=0.4, sinks=1, recent=2), profiles(heads=4), rules_per_layer=1)
    plan = np.array(tied.solve(tied.losses[1])).reshape(2, 4)
    assert all(len(set(row)) == 1 for row in plan.tolist())


def test_a_density_below_the_narrowest_windows_is_refused():
    with pytest.raises(SpecError, match=r"density.*0\.1"):
        Program.of(MoA(density=0.1, sinks=1, recent=2), profiles())


def test_rules_for_another_density_are_not_used(monkeypatch, llama):
    monkeypatch.setattr(windows, "_remembered", {})
    known = fingerprint(Anatomy.of(llama))
    table = ((4.0, 0.0, 2.0),) * 2
    MoA(alpha=table, beta=((0.0, 0.25, 0.5),) * 2, fitted_on=known, density=0.5).remember()
    with MoA().attach(llama) as kept:
        assert kept.policy.windows(0, 1000) == [64, 250, 502]
        assert kept.policy.windows(0, 1001) == [64, 250, 502]
    with pytest.raises(SpecError, match=r"density.*0\.25.*0\.5"):
        MoA(density=0.25).attach(llama)
    MoA(alpha=table, beta=((0.25, 0.0, 0.25),) * 2, fitted_on=known, density=0.25).remember()
    for density, last in ((0.25, 0.25), (0.5, 0.5)):
        with MoA(density=density).attach(llama) as kept:
            assert kept.policy.beta[0][2] == last


def test_windows_grow_with_the_text_and_never_faster():
    plan = MoA(alpha=((-40.0, 10.0, 0.0),), beta=((1.0, 0.5, 1.0),), fitted_on="x", recent=8)
    before = plan.windows(0, 1)
    assert before == [8, 10, None]
    for seen in range(2, 300):
        now = plan.windows(0, seen)
        assert all(b is None or 0 <= n - b <= 1 for n, b in zip(now, before, strict=True))
        before = now


def test_a_plan_over_h2o_cuts_to_any_budget(llama):
    with Adaptive(policy=H2O(budget=1.0), safeguard=0.0).attach(llama) as kept, torch.no_grad():
        whole = kept.new_cache()
        feed(llama, tokens(2, 30), [30], whole)
        for budget in (5, 9, 0.5):
            cut = whole.cut(budget)
            due = budget if isinstance(budget, int) else 15
            for layer in range(2):
                assert [(cut.positions(layer)[row] >= 0).sum().item() for row in range(2)] == [3 * due] * 2
        assert whole.layers[0].slots == 30
