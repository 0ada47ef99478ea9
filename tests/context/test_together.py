"""One reading serves several policies."""

import pytest
import torch

from vestige.context.cache import KeptCache
from vestige.context.evict.h2o import H2O
from vestige.context.plan.duo_attention import DuoAttention
from vestige.context.plan.windows import fingerprint
from vestige.context.policy import CachePolicy
from vestige.context.together import Together
from vestige.core.anatomy import Anatomy
from vestige.errors import SpecError
from vestige.models.tiny import tiny_model

NAMES = ("full", "streaming-llm", "h2o", "a2sf", "snapkv", "tova", "knorm", "expected-attention", "pyramid", "adaptive")


def whole(name: str) -> CachePolicy:
    policy = CachePolicy.from_spec(name)
    assert isinstance(policy, CachePolicy)
    return policy if name == "full" else policy.with_budget(1.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_each_policy_keeps_what_it_keeps_alone(padded: bool, chunks: int) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, model.config.vocab_size, (2, 120), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    policies = tuple(whole(name) for name in NAMES)

    def read(policy: CachePolicy) -> tuple[CachePolicy, KeptCache]:
        with policy.attach(model) as kept, torch.no_grad():
            cache, seen = kept.new_cache(), 0
            for piece in ids.chunk(chunks, dim=1):
                seen += piece.shape[1]
                model(piece, attention_mask=mask[:, :seen], past_key_values=cache)
            return kept.policy, cache

    joined, cache = read(Together(policies=policies))
    assert isinstance(joined, Together)
    for index, (name, policy) in enumerate(zip(NAMES, policies, strict=True)):
        _, alone = read(policy)
        mine = joined.part(cache, index)
        ours, theirs = (c.fork() if name == "full" else c.cut(80) for c in (mine, alone))
        assert ours.nbytes_by_part() == theirs.nbytes_by_part(), name
        for layer in range(len(ours.layers)):
            assert torch.equal(ours.positions(layer), theirs.positions(layer)), name
            for key, tensor in theirs.layers[layer].tensors().items():
                torch.testing.assert_close(ours.layers[layer].tensors()[key], tensor)


def test_a_policy_that_reads_in_its_own_way_is_refused() -> None:
    policy = CachePolicy.from_spec("tidal-decode")
    assert isinstance(policy, CachePolicy)
    with pytest.raises(SpecError, match="tidal-decode reads in its own way"):
        Together(policies=(policy,))


def test_a_plan_by_windows_leaves_what_it_leaves_alone() -> None:
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    gates = tuple(tuple(float(head == layer % 2) for head in range(anatomy.num_kv_heads)) for layer in range(2))
    plan = DuoAttention(gates=gates, fitted_on=fingerprint(anatomy), sinks=2, recent=5)
    ids = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with plan.attach(model) as kept, torch.no_grad():
        model(ids, past_key_values=(alone := kept.new_cache()))
    with Together(policies=(H2O(budget=1.0), plan)).attach(model) as kept, torch.no_grad():
        model(ids, past_key_values=(shared := kept.new_cache()))
        assert isinstance(kept.policy, Together)
        mine = kept.policy.part(shared, 1).cut()
    for layer in range(len(alone.layers)):
        assert torch.equal(mine.positions(layer), alone.positions(layer))
        torch.testing.assert_close(mine.layers[layer].keys, alone.layers[layer].keys)
    assert all(layer.slots == 40 for layer in shared.layers)
