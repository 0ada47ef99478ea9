"""The references against attention written another way, and against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vestige.evidence.references import a2sf, full, h2o, reference_of, streaming_llm

HEADS, KV, T, DIM = 6, 2, 18, 5
SETTINGS = {"budget": 7, "sinks": 2, "recent": 2, "when": "both"}
POLICIES = {
    "streaming-llm": (streaming_llm.simulate, {}),
    "h2o": (h2o.simulate, {}),
    "a2sf": (a2sf.simulate, {"forgetting": 0.7}),
}


def inputs(seed: int = 0):
    torch.manual_seed(seed)
    return torch.randn(HEADS, T, DIM), torch.randn(KV, T, DIM), torch.randn(KV, T, DIM)


def masked_attention(query, key, value, mask, scaling=DIM**-0.5):
    """All queries at once, with a mask ``(kv, T, T)`` of what each may see."""
    group = HEADS // KV
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(group, 0),
        value.double().repeat_interleave(group, 0),
    )
    logits = (query @ key.transpose(1, 2) * scaling).masked_fill(~mask.repeat_interleave(group, 0), float("-inf"))
    return logits.softmax(-1) @ value


def mask_of(trace, chunks, window=None):
    """What each query may see, from what was held before its chunk: it and the chunk up to the query itself.

    While decoding, what the last step left and this step kept.
    """
    mask = torch.zeros(KV, T, T, dtype=torch.bool)
    start = 0
    before = [set()] * KV
    for count, after in zip(chunks, trace.kept, strict=True):
        for head in range(KV):
            for n in range(start, start + count):
                decoding = count == 1 and start > 0
                held = set(after[head]) if decoding else before[head] | set(range(start, n + 1))
                mask[head, n, sorted(p for p in held if window is None or n - p < window)] = True
        before = [set(positions) for positions in after]
        start += count
    return mask


@pytest.mark.parametrize("window", [None, 4])
def test_full_is_causal_attention(window):
    query, key, value = inputs()
    trace = full.simulate(query, key, value, [10, 1, 7], window=window)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    if window:
        causal &= ~torch.ones(T, T, dtype=torch.bool).tril(-window)
    expected = masked_attention(query, key, value, causal.expand(KV, T, T))
    torch.testing.assert_close(trace.output, expected, atol=1e-12, rtol=0)
    assert trace.kept[-1] == (tuple(range(T)),) * KV


@pytest.mark.parametrize("chunks", [[T], [9] + [1] * 9, [5, 6, 1, 1, 5], [1] * T])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("when", ["both", "decoding"])
def test_output_is_attention_over_what_was_held(name, chunks, when):
    simulate, extra = POLICIES[name]
    query, key, value = inputs(1)
    trace = simulate(query, key, value, chunks, **{**SETTINGS, "when": when}, **extra)
    expected = masked_attention(query, key, value, mask_of(trace, chunks))
    torch.testing.assert_close(trace.output, expected, atol=1e-12, rtol=0)
    gone = ~mask_of(trace, chunks)
    assert trace.attention[gone].abs().max() == 0
    torch.testing.assert_close(trace.attention.sum(-1), torch.full((KV, T), HEADS / KV, dtype=torch.float64))


@pytest.mark.parametrize("name", POLICIES)
def test_budget_sinks_and_window_hold(name):
    simulate, extra = POLICIES[name]
    chunks = [9] + [1] * 9
    trace = simulate(*inputs(2), chunks, **SETTINGS, **extra)
    for step, seen in zip(trace.kept, range(9, T + 1), strict=True):
        for positions in step:
            assert len(positions) == SETTINGS["budget"]
            assert {0, 1, seen - 2, seen - 1} <= set(positions)


@pytest.mark.parametrize("name", POLICIES)
def test_schedule(name):
    simulate, extra = POLICIES[name]
    chunks = [9] + [1] * 4 + [5]
    lengths = {
        when: [len(step[0]) for step in simulate(*inputs(3), chunks, **{**SETTINGS, "when": when}, **extra).kept]
        for when in ("prefill", "decoding", "both")
    }
    assert lengths == {"prefill": [7, 8, 9, 10, 11, 7], "decoding": [9, 7, 7, 7, 7, 12], "both": [7] * 6}


def test_shares_are_rounded_up():
    settings = {"budget": 0.3, "sinks": 0, "recent": 0.5, "when": "both"}
    trace = h2o.simulate(*inputs(4), [9] + [1] * 9, **settings)
    assert [len(step[0]) for step in trace.kept] == [3, 3, 4, 4, 4, 5, 5, 5, 6, 6]


def test_streaming_holds_sinks_and_the_last_tokens():
    trace = streaming_llm.simulate(*inputs(), [9] + [1] * 9, **{**SETTINGS, "recent": 0})
    for step, seen in zip(trace.kept, range(9, T + 1), strict=True):
        assert step == ((0, 1, *range(seen - 5, seen)),) * KV


def test_h2o_keeps_what_was_looked_at():
    """Token 2 is the only one whose key fits the queries; it stays, and the others go from the oldest."""
    query = torch.ones(1, 8, 2)
    key = torch.zeros(1, 8, 2)
    key[0, 2] = 9.0
    trace = h2o.simulate(query, key, key, [5, 1, 1, 1], budget=3, sinks=0, recent=1, when="both")
    assert all(2 in step[0] for step in trace.kept)
    # Beside token 2 and the newest, the one gathering over more queries: of 0, 1, 3, 4 that is the oldest.
    assert trace.kept[0] == ((0, 2, 4),)


def test_forgetting_is_the_recursion():
    """The sum of powers is A <- alpha A + S, token after token, and 1 is H2O."""
    query, key, value = inputs(5)
    chunks = [9] + [1] * 9
    trace = a2sf.simulate(query, key, value, chunks, forgetting=0.6, **SETTINGS)
    A = torch.zeros(KV, T, dtype=torch.float64)
    for n in range(9):
        A = 0.6 * A + trace.attention[:, n]
    for head in range(KV):
        middle = sorted(range(2, 7), key=lambda p: float(A[head, p]))[-3:]
        assert trace.kept[0][head] == tuple(sorted({0, 1, 7, 8, *middle}))
    assert (
        a2sf.simulate(query, key, value, chunks, forgetting=1.0, **SETTINGS).kept
        == h2o.simulate(query, key, value, chunks, **SETTINGS).kept
    )


def test_scaling_is_used():
    query, key, value = inputs(6)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(KV, T, T)
    trace = full.simulate(query, key, value, [T], scaling=0.9)
    torch.testing.assert_close(
        trace.output, masked_attention(query, key, value, causal, scaling=0.9), atol=1e-12, rtol=0
    )


def test_references_are_found_by_name():
    assert reference_of("streaming-llm") is streaming_llm
    assert reference_of("no-such-method") is None
