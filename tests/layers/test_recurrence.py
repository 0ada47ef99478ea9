"""The engine of linear attention and the delta rule: chunks are steps, whatever the decay, the rate and the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vestige.layers.ops import fla
from vestige.layers.ops.recurrence import FAINTEST, Drive, chunked, recurrence, step

BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 37, 4, 6, 5
DECAYS = {
    "none": lambda: None,
    "per head": lambda: -torch.rand(HEADS),
    "per token": lambda: -3 * torch.rand(BATCH, LENGTH, HEADS),
    "per channel": lambda: -3 * torch.rand(BATCH, LENGTH, HEADS, KEYS),
    "abrupt": lambda: -300 * torch.rand(BATCH, LENGTH, HEADS, KEYS) ** 4,
}


def make(decay="none", rate=False, groups=HEADS, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(BATCH, LENGTH, groups, KEYS, dtype=torch.float64)
    k = F.normalize(torch.randn(BATCH, LENGTH, groups, KEYS, dtype=torch.float64), dim=-1)
    v = torch.randn(BATCH, LENGTH, HEADS, VALUES, dtype=torch.float64)
    g = DECAYS[decay]()
    beta = 1.9 * torch.rand(BATCH, LENGTH, HEADS).to(dtype) if rate else None
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    return Drive(q, k, v, None if g is None else g.to(dtype).requires_grad_(), beta, scale=0.3)


def by_steps(drive, state, starts=None):
    """One token after the other."""
    read = []
    for t in range(drive.v.shape[1]):
        decay = drive.decay
        if decay is not None:
            decay = decay.expand(drive.v.shape[:3])[:, t] if decay.dim() == 1 else decay[:, t]
        if starts is not None and state is not None:
            state = state * ~starts[:, t].view(-1, 1, 1, 1)
        beta = None if drive.beta is None else drive.beta[:, t]
        out, state = step(Drive(drive.q[:, t], drive.k[:, t], drive.v[:, t], decay, beta, drive.scale), state)
        read.append(out)
    return torch.stack(read, 1), state


def leaves(drive):
    return [t for t in (drive.q, drive.k, drive.v, drive.decay) if t is not None]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_are_steps(decay, rate, groups, packed):
    """Forward and backward, from a state that is not empty."""
    drive = make(decay, rate, groups)
    state = torch.randn(BATCH, HEADS, KEYS, VALUES, dtype=torch.float64)
    starts = torch.rand(BATCH, LENGTH) < 0.15 if packed else None
    results = [chunked(drive, state, starts=starts, chunk=8), by_steps(drive, state, starts)]
    weights = [torch.randn_like(t) for t in results[0]]
    gradients = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, result, strict=True)), leaves(drive))
        for result in results
    ]
    for mine, due in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True):
        torch.testing.assert_close(mine, due, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 4, 16, 32, 64])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    drive = make("per channel", rate=True)
    torch.testing.assert_close(chunked(drive, chunk=chunk), by_steps(drive, None), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("decay", ["per token", "per channel", "abrupt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_differentiable(decay, dtype):
    drive, exact = make(decay, rate=True, dtype=dtype), make(decay, rate=True)
    out, state = chunked(drive, chunk=16)
    assert out.dtype == dtype and state.dtype == torch.float32
    out.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(drive))
    error = ((out.double() - chunked(exact, chunk=16)[0]).norm() / out.double().norm()).item()
    assert error < (2e-5 if dtype == torch.float32 else 2e-2)


def test_a_gate_that_shuts_altogether_gives_numbers():
    """A decay of zero is the logarithm of nothing."""
    drive = make("per token", rate=True, dtype=torch.float32)
    shut = drive.decay.detach().clone()
    shut[:, ::5] = -torch.inf
    drive = Drive(drive.q, drive.k, drive.v, shut.requires_grad_(), drive.beta)
    out, state = chunked(drive, chunk=8)
    torch.testing.assert_close((out, state), by_steps(drive, None), atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(drive))


def test_autocast_does_not_reach_the_state():
    drive = make("per token", rate=True, dtype=torch.float32)
    plain = chunked(drive)
    with torch.autocast("cpu", torch.bfloat16):
        cast = chunked(drive)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_padding_leaves_no_trace():
    drive = make("per token", rate=True)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[:, :9] = False
    blanked = drive.blanked(valid)
    rest = Drive(drive.q[:, 9:], drive.k[:, 9:], drive.v[:, 9:], drive.decay[:, 9:], drive.beta[:, 9:], drive.scale)
    out, state = chunked(blanked, chunk=8)
    due, last = chunked(rest, chunk=8)
    torch.testing.assert_close(out[:, 9:], due)
    torch.testing.assert_close(state, last)


def test_one_token_takes_one_step():
    drive = make("per head", rate=True)
    one = Drive(drive.q[:, :1], drive.k[:, :1], drive.v[:, :1], drive.decay, drive.beta[:, :1])
    torch.testing.assert_close(recurrence(one), chunked(one))


def test_gradcheck():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    decay = (-torch.rand(1, 5, 1, 2, dtype=torch.float64)).requires_grad_()
    beta = torch.rand(1, 5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: chunked(Drive(*t), chunk=2), (q, k, v, decay, beta))


@pytest.mark.parametrize(
    ("decay", "rate", "hopper", "triton", "version", "wrong"),
    [
        ("per token", True, True, (3, 6, 0), (0, 6, 0), True),
        ("per token", False, True, (3, 6, 0), (0, 6, 0), True),
        ("per token", True, True, (3, 7, 1), (0, 6, 0), False),
        ("per token", True, False, (3, 6, 0), (0, 6, 0), False),
        ("per channel", False, True, (3, 6, 0), (0, 6, 0), False),
        ("none", True, True, (3, 6, 0), (0, 6, 0), False),
        ("none", True, True, (3, 6, 0), (0, 5, 1), True),
        ("none", True, True, (3, 3, 1), (0, 5, 1), False),
        ("none", False, True, (3, 6, 0), (0, 5, 1), False),
    ],
)
def test_backward_passes_that_would_be_wrong_are_not_asked_for(
    decay, rate, hopper, triton, version, wrong, monkeypatch
):
    monkeypatch.setattr(fla, "_hopper", lambda device: hopper)
    monkeypatch.setattr(fla, "_version", {"triton": triton, "fla": version}.__getitem__)
    assert fla._wrong(make(decay, rate)) is wrong


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_kernels_of_others_are_given_what_is_there_uncopied(groups, monkeypatch):
    monkeypatch.setattr(fla, "_kernel", lambda name: name)
    drive = make("per channel", groups=groups, dtype=torch.float32)
    kernel, call = fla.prepared(replace(drive, bounded=True))
    assert kernel == "gla.chunk_gla"
    assert call["v"] is drive.v and call["g"] is drive.decay
    for name in "qk":
        assert call[name].shape[:3] == drive.v.shape[:3]
        assert (call[name] is getattr(drive, name)) == (groups == HEADS)
    assert (fla.prepared(replace(drive, decay=drive.decay - torch.inf))[1]["g"] == FAINTEST).all()
