"""The context room on CUDA: kernels against float64, captured steps against plain ones, memory of long prompts."""

import gc

import pytest
import torch

from vestige.context.evict.a2sf import A2SF
from vestige.context.evict.full import Full
from vestige.context.evict.h2o import H2O
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.select.longheads import LongHeads
from vestige.layers.ops.attention_mass import attention_mass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = "cuda"


def llama(dtype=torch.bfloat16, layers=3, heads=8, kv_heads=2, dim=64, length=32768, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=heads * dim,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(CUDA, dtype)


def mass_by_definition(query, keys, weights, scaling, valid=None):
    """Column sums in float64, with the whole matrix."""
    query, keys, weights = query.double(), keys.double(), weights.double()
    group = query.shape[1] // keys.shape[1]
    count, entries = query.shape[2], keys.shape[2]
    logits = query @ keys.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    seen = torch.arange(entries, device=CUDA)[None] <= torch.arange(entries - count, entries, device=CUDA)[:, None]
    if valid is not None:
        seen = seen & valid.repeat_interleave(group, 1)[:, :, None]
    share = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1).nan_to_num()
    return (share * weights[:, None, :, None]).sum(2).unflatten(1, (-1, group)).sum(2)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize(
    "count, entries, dim", [(300, 300, 64), (257, 1000, 128), (1, 513, 64), (9, 3000, 80), (129, 130, 80)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_mass_matches_its_definition(dtype, bound, count, entries, dim, padded):
    torch.manual_seed(count + dim)
    query = torch.randn(2, 6, count, dim, device=CUDA, dtype=dtype)
    keys = torch.randn(2, 2, entries, dim, device=CUDA, dtype=dtype)
    weights = torch.rand(2, count, device=CUDA)
    valid = None
    if padded:
        valid = torch.rand(2, 2, entries, device=CUDA) > 0.3
    wanted = mass_by_definition(query, keys, weights, dim**-0.5, valid)
    got = attention_mass(query, keys, weights, scaling=dim**-0.5, valid=valid)
    assert (got - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("capacity, group, dim", [(64, 3, 64), (2048, 4, 128), (1000, 1, 80), (5000, 8, 128)])
def test_slots_attend_as_by_definition(dtype, bound, capacity, group, dim):
    from vestige.layers.ops.decode_triton import BY_MASS, SlotTable, attend_slots, write_slot

    torch.manual_seed(capacity)
    rows, heads = 3, 2
    segments = rows * heads
    ints = {"dtype": torch.int32, "device": CUDA}
    keys, values = (torch.randn(segments * capacity, dim, device=CUDA, dtype=dtype) for _ in range(2))
    positions = torch.arange(capacity, **ints).repeat(segments)
    positions[7:30] = -1
    mass = torch.rand(segments * capacity, device=CUDA)
    before = mass.clone()
    table = SlotTable(
        keys=keys,
        values=values,
        positions=positions,
        mass=mass,
        offset=torch.arange(segments, **ints) * capacity,
        length=torch.full((segments,), capacity, **ints),
        target=torch.zeros(segments, **ints),
        rows=rows,
        kv_heads=heads,
        capacity=capacity,
    )
    seen = torch.full((rows,), capacity, **ints)
    query = torch.randn(rows, heads * group, 1, dim, device=CUDA, dtype=dtype)
    out = attend_slots(table, query, seen, scaling=dim**-0.5, mode=BY_MASS, carry=0.9, sinks=4, recent=16)
    logits = torch.einsum(
        "rhgd,rhnd->rhgn",
        query.double().view(rows, heads, group, dim),
        keys.double().view(rows, heads, capacity, dim),
    )
    held = positions.view(rows, heads, 1, capacity)
    share = torch.softmax((logits * dim**-0.5).masked_fill(held < 0, float("-inf")), -1)
    wanted = torch.einsum("rhgn,rhnd->rhgd", share, values.double().view(rows, heads, capacity, dim))
    assert (out.double().flatten() - wanted.flatten()).norm() / wanted.norm() < bound
    ranked = before.view(rows, heads, capacity) * 0.9 + share.sum(2)
    assert (mass.view_as(ranked) - ranked).norm() / ranked.norm() < bound
    rank = mass.view(rows, heads, capacity).clone()
    rank[(held[:, :, 0] < 4) | (held[:, :, 0] >= capacity + 1 - 16)] = 3e38
    rank[held[:, :, 0] < 0] = -1
    assert torch.equal(table.target.view(rows, heads).long(), rank.argmin(-1))
    new = torch.randn(rows, heads, 1, dim, device=CUDA, dtype=dtype)
    write_slot(table, new, -new, seen + 1, BY_MASS)
    at = (table.offset + table.target).long()
    assert torch.equal(keys[at], new.view(segments, dim)) and torch.equal(values[at], -new.view(segments, dim))
    assert (positions[at] == capacity).all() and (mass[at] == 0).all()


CAPTURED = (
    H2O(budget=96),
    A2SF(budget=96),
    A2SF(budget=96, when="prefill"),
    StreamingLLM(budget=96),
    StreamingLLM(budget=96, when="prefill"),
    StreamingLLM(budget=96, reposition=False),
)


@pytest.mark.parametrize("policy", CAPTURED, ids=str)
def test_a_captured_step_gives_what_a_plain_one_gives(policy):
    model = llama(torch.float32)
    long = torch.randint(1, 512, (1, 300), device=CUDA)
    short = torch.randint(1, 512, (1, 60), device=CUDA)
    prompts = torch.cat([long, torch.cat([torch.zeros(1, 240, dtype=torch.long, device=CUDA), short], 1)])
    mask = (prompts != 0).long()
    results = {}
    for graph in (False, None):
        with policy.attach(model, graph=graph) as kept:
            alone = model.generate(long, max_new_tokens=60, do_sample=False)
            both = model.generate(prompts, attention_mask=mask, max_new_tokens=60, do_sample=False)
            again = model.generate(long, max_new_tokens=60, do_sample=False)
            beams = model.generate(long, max_new_tokens=12, num_beams=3, do_sample=False)
            assert torch.equal(alone, again)
            results[graph] = (alone, both, beams, [p.sort(-1).values for p in map(kept.positions, range(3))])
    for plain, captured in zip(results[False], results[None], strict=True):
        if isinstance(plain, list):
            assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
        else:
            assert torch.equal(plain, captured)


@pytest.mark.parametrize("policy", CAPTURED, ids=str)
def test_steps_outside_the_graph_may_come_between(policy):
    """A watched step is taken by the layers themselves, in the place where the graph goes on afterwards."""
    model, logits = llama(torch.float32), {}
    prompt = torch.randint(1, 512, (2, 150), device=CUDA)
    ids = torch.randint(1, 512, (12, 2, 1), device=CUDA)
    for graph in (False, None):
        with torch.no_grad(), policy.attach(model, graph=graph) as kept:
            cache = model(prompt, use_cache=True).past_key_values
            assert (kept.graph_mode(cache) is not None) == (graph is None)
            steps = []
            for number, token in enumerate(ids):
                watch = kept.watch(lambda *seen: None) if number == 5 else None
                steps.append(model(input_ids=token, past_key_values=cache).logits)
                if watch is not None:
                    watch.remove()
            logits[graph] = torch.cat(steps, 1)
    assert (logits[False] - logits[None]).norm() / logits[False].norm() < 1e-4


def test_streaming_over_unbounded_text_is_captured():
    """Turned anew in each step, the sinks stay where they belong over many times the budget."""
    model, logits = llama(torch.float32, length=256), {}
    ids = torch.randint(1, 512, (700, 1, 1), device=CUDA)
    for graph in (False, None):
        with torch.no_grad(), StreamingLLM(budget=48).attach(model, graph=graph) as kept:
            cache = model(ids[:64].view(1, 64), use_cache=True).past_key_values
            steps = [model(input_ids=one, past_key_values=cache).logits for one in ids]
            assert kept.graph_mode(cache) == (None if graph is False else 2)
            logits[graph] = torch.cat(steps, 1)[:, -50:]
            assert sorted(kept.positions(2)[0, 0].tolist())[:5] == [0, 1, 2, 3, 720]
    assert (logits[False] - logits[None]).norm() / logits[False].norm() < 1e-4


def test_captures_share_their_workspace():
    """Attachments one after the other leave nothing on the device."""
    model = llama()
    prompt = torch.randint(1, 512, (3, 200), device=CUDA)
    left = []
    for _ in range(4):
        with torch.no_grad(), A2SF(budget=64).attach(model) as kept:
            cache = model(prompt, use_cache=True).past_key_values
            model(input_ids=prompt[:, :1], past_key_values=cache)
            kept.cache = None
        del cache, kept
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[2] == left[3], left


def test_an_earlier_cache_survives_the_next_one():
    model = llama(torch.float32)
    prompts = torch.randint(1, 512, (2, 1, 200), device=CUDA)
    with torch.no_grad(), A2SF(budget=64).attach(model) as kept:
        first = model(prompts[0], use_cache=True).past_key_values
        step = model(prompts[0][:, :1], past_key_values=first).logits
        held = first.layers[1].keys.clone()
        model.generate(prompts[1], max_new_tokens=5, do_sample=False)
        assert torch.equal(first.layers[1].keys, held)
        assert kept.cache is not first and step.isfinite().all()


def test_full_appends_in_a_graph():
    model = llama(torch.float32)
    prompt = torch.randint(1, 512, (2, 130), device=CUDA)
    plain = model.generate(prompt, max_new_tokens=40, do_sample=False)
    with Full().attach(model) as kept:
        assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), plain)
    with Full().attach(model, graph=True) as kept:
        assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), plain)
        assert kept.positions(0).shape[-1] == 169
    assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), plain)


def test_bf16_generates_within_the_budget():
    model = llama()
    prompt = torch.randint(1, 512, (1, 1000), device=CUDA)
    before = model(prompt).logits
    with A2SF(budget=128).attach(model) as kept:
        out = model.generate(prompt, max_new_tokens=200, do_sample=False)
        assert out.shape[1] == 1200
        assert all(kept.positions(layer).shape[-1] == 128 for layer in range(3))
        held = sum(t.untyped_storage().nbytes() for layer in kept.cache.layers for t in layer.tensors().values())
        assert kept.nbytes == held
    assert torch.equal(model(prompt).logits, before)


def test_a_long_prompt_costs_no_more_memory_than_attention_alone():
    model = llama(layers=4, heads=32, kv_heads=8, dim=128)
    prompt = torch.randint(1, 512, (1, 16384), device=CUDA)

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            model(prompt, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    peak()
    alone = peak()
    with A2SF(budget=1024).attach(model):
        peak()
        scored = peak()
    with H2O(budget=1024).attach(model):
        peak()
        accumulated = peak()
    print(f"16k: sdpa {alone / 2**20:.0f} MiB, a2sf {scored / alone:.2f}x, h2o {accumulated / alone:.2f}x")
    assert scored <= alone and accumulated <= alone


def test_compiled_blocks_and_fast_linear_maps_agree_with_plain_ones():
    model = llama()
    prompt = torch.randint(1, 512, (1, 200), device=CUDA)
    ids = torch.randint(1, 512, (12, 1, 1), device=CUDA)
    logits = {}
    for graph, compiled in ((False, False), (None, False), (None, True)):
        with torch.no_grad(), A2SF(budget=64).attach(model, graph=graph, compile=compiled):
            cache = model(prompt, use_cache=True).past_key_values
            logits[graph, compiled] = [model(input_ids=x, past_key_values=cache).logits.float() for x in ids]
    for plain, captured, fused in zip(*logits.values(), strict=True):
        assert (captured - plain).norm() / plain.norm() < 0.02
        assert (fused - plain).norm() / plain.norm() < 0.02
    assert "forward" not in vars(model.model.layers[0]) and "forward" not in vars(model.model.layers[0].mlp.up_proj)


def test_ragged_heads_decode_as_they_do_on_the_cpu():
    import vestige

    model = llama(torch.float32)
    prompt = torch.randint(1, 512, (2, 300), device=CUDA)
    inner = vestige.method("snapkv", budget=96)
    policy = vestige.method("adaptive", policy=inner)
    logits = {}
    for device in ("cpu", CUDA):
        model.to(device)
        with torch.no_grad(), policy.attach(model) as kept:
            cache = model(prompt.to(device), use_cache=True).past_key_values
            steps = [model(input_ids=prompt[:, :1].to(device), past_key_values=cache).logits.cpu() for _ in range(8)]
            logits[device] = torch.cat(steps, 1)
            assert len({len(p[p >= 0]) for p in kept.positions(0).flatten(0, 1)}) > 1  # unequal heads
    assert (logits["cpu"] - logits[CUDA]).norm() / logits["cpu"].norm() < 1e-3


def test_chunks_are_read_as_on_the_cpu():
    """A prompt in pieces, rows with padding, and tokens that come one by one."""
    model = llama(torch.float64)
    ids, mask = torch.randint(1, 512, (2, 700)), torch.ones(2, 700, dtype=torch.long)
    mask[0, :90] = 0
    found = {}
    for device in ("cpu", CUDA):
        model.to(device)
        with torch.no_grad(), LongHeads(budget=96, chunk=16).attach(model) as kept:
            cache, logits = kept.new_cache(), []
            for first, last in ((0, 400), (400, 698), (698, 699), (699, 700)):
                part = ids[:, first:last].to(device)
                out = model(part, attention_mask=mask[:, :last].to(device), past_key_values=cache, use_cache=True)
                logits.append(out.logits.cpu())
            found[device] = torch.cat(logits, 1)[mask.bool()]
    assert (found["cpu"] - found[CUDA]).abs().max() < 1e-4
