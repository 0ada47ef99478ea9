"""Attention within a window, the layout of tokens, rotary positions, short convolutions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vestige.errors import InputError
from vestige.layers.layout import Layout, positions_of, starts_of
from vestige.layers.mixers.softmax import Softmax
from vestige.layers.ops import flash_window
from vestige.layers.ops import windowed_attention as module
from vestige.layers.ops.windowed_attention import windowed_attention
from vestige.layers.parts import ShortConvolution, rotate, unit
from vestige.layers.place import Place
from vestige.layers.state import LayerState


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """So that a few dozen queries make several blocks."""
    monkeypatch.setattr(module, "LEAST_BLOCK", 4)


def written_out(q, k, v, window, scaling, valid=None, sequence=None):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    length, held = q.shape[2], k.shape[2]
    gap = torch.arange(held)[None, :] - torch.arange(held - length, held)[:, None]
    seen = ((gap <= 0) & (gap > -window))[None, None]
    if valid is not None:
        seen = seen & valid[:, None, None]
    if sequence is not None:
        seen = seen & (sequence[:, None, -length:, None] == sequence[:, None, None])
    seen = seen | (gap == 0)
    return (scaling * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [1, 3, 8, 40])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 6), (5, 2), (23, 0), (23, 7), (24, 0)])
def test_blocks_are_one_masked_softmax(window, length, past):
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 2, past + length, 4, dtype=torch.float64) for _ in range(2))
    valid = torch.ones(2, past + length, dtype=torch.bool)
    valid[0, : (past + length) // 3] = False
    for mask in (None, valid):
        mine = windowed_attention(q, k, v, window=window, scaling=0.7, valid=mask)
        torch.testing.assert_close(mine, written_out(q, k, v, window, 0.7, mask), atol=1e-12, rtol=0)


def test_no_window_reaches_into_another_sequence():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 21, 4, dtype=torch.float64) for _ in range(3))
    sequence = starts_of(torch.tensor([0, 5, 6, 16, 21]), 21).cumsum(1)
    mine = windowed_attention(q, k, v, window=4, scaling=1.0, sequence=sequence)
    torch.testing.assert_close(mine, written_out(q, k, v, 4, 1.0, sequence=sequence), atol=1e-12, rtol=0)


def window_alone(q, k, v, window, scaling):
    """What the kernels give, written out: answers, and the logarithm of the sum of weights."""
    group, length, held = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    gap = torch.arange(held)[None, :] - torch.arange(held - length, held)[:, None]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = (scaling * q @ k.mT).masked_fill((gap > 0) | (gap <= -window), -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits


@pytest.mark.parametrize("case", ["plain", "sink", "always", "both"])
def test_what_all_queries_see_beside_the_kernels(case, monkeypatch):
    """Answers and slopes are those of the portable form, where kernels know of the window alone and, going back, are
    given the whole output and sum of weights."""
    torch.manual_seed(0)

    def forward(q, k, v, window, scaling):
        return *window_alone(q, k, v, window, scaling)[:2], []

    def backward(slope, q, k, v, out, weight, random, window, scaling):
        *_, logits = window_alone(q, k, v, window, scaling)
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
        share = (logits - weight[..., None]).exp()
        back = scaling * share * (slope @ wide_v.mT - (slope * out).sum(-1, keepdim=True))
        both = (t.unflatten(1, (-1, group)).sum(2) for t in (back.mT @ q, share.mT @ slope))
        return [back @ wide_k, *both]

    monkeypatch.setattr(flash_window, "_forward", forward)
    monkeypatch.setattr(flash_window, "_backward", backward)
    shapes = {"query": (2, 4, 9, 6), "key": (2, 2, 11, 6), "value": (2, 2, 11, 6), "sink": (4,)}
    shapes |= {"asked": (2, 4, 9, 3), "keys": (2, 5, 3), "values": (2, 5, 6)}
    parts = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    q, k, v, sink, *always = parts.values()
    given = {
        "sink": sink if case in ("sink", "both") else None,
        "always": tuple(always) if case in ("always", "both") else None,
    }
    found = []
    for form in (flash_window.by_flash, module.by_blocks):
        out = form(q, k, v, window=4, scaling=0.7, **given)
        slopes = torch.autograd.grad(out.square().sum(), list(parts.values()), allow_unused=True)
        found.append([out, *(t for t in slopes if t is not None)])
    assert len(found[0]) == {"plain": 4, "sink": 5, "always": 7, "both": 8}[case]
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-9)


def test_which_windows_the_kernels_are_given():
    """None on a CPU."""
    assert not flash_window.serves(*(torch.randn(1, 2, 64, 16, dtype=torch.bfloat16) for _ in range(2)))


def test_operators_of_another_form_are_not_called(monkeypatch):
    """PyTorch does not promise to keep them: here they are as they were written for; any other is left alone."""
    assert flash_window._as_written_here()
    monkeypatch.setattr(flash_window, "_span", lambda window, scaling: {"windows": (window, 0), "scale": scaling})
    assert not flash_window._as_written_here()


@pytest.mark.parametrize("allowed", [True, False])
def test_longer_keys_are_not_given_to_cudnn(allowed, monkeypatch):
    """It would plan anew for each number of keys; what is allowed elsewhere is as it was after."""
    flags, seen = torch.backends.cuda, []

    def attend(module, q, k, v, mask, **options):
        seen.append((k.shape[2], flags.cudnn_sdp_enabled(), flags.math_sdp_enabled()))
        return torch.zeros_like(q).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recorded", attend)
    layer, state = Softmax().build(Place(hidden_size=8, heads=2)), LayerState()
    before = flags.cudnn_sdp_enabled(), flags.math_sdp_enabled()
    flags.enable_math_sdp(allowed)
    try:
        for past, count in ((0, 4), (4, 1), (5, 2)):
            layout = Layout.of(1, count, past=past)
            layout.implementation = "recorded"
            layer(torch.randn(1, count, 8), layout, state)
        assert flags.cudnn_sdp_enabled() == before[0]
    finally:
        flags.enable_math_sdp(before[1])
    assert before[0] and seen == [(4, True, allowed), (5, not allowed, allowed), (7, not allowed, allowed)]


def test_positions_begin_anew():
    starts = starts_of(torch.tensor([0, 3, 4, 9]), 9)
    assert positions_of(starts).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]


def test_layout_by_hand():
    held = torch.ones(2, 9, dtype=torch.bool)
    held[1, :4] = False
    layout = Layout.of(2, 3, past=6, held=held)
    assert layout.positions.tolist() == [[6, 7, 8], [2, 3, 4]]
    assert layout.mask.shape == (2, 1, 3, 9)
    assert layout.mask[1, 0].tolist() == [[False] * 4 + [True] * n + [False] * (5 - n) for n in (3, 4, 5)]
    assert Layout.of(2, 3).mask is None and Layout.of(2, 1, past=5).mask is None
    blanked = Layout.of(2, 9, held=held).blank(torch.ones(2, 9, 2), -1.0)
    assert blanked[:, :, 0].sum(1).tolist() == [9, 5 - 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held": torch.ones(2, 4, dtype=torch.bool)}, "held"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "one row"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Layout.of(2, 3, **options)


@pytest.mark.parametrize("ends", [[0, 2], [1, 3], [0, 2, 2, 3], [0, 4], [3]])
def test_wrong_boundaries_are_refused(ends):
    with pytest.raises(InputError, match="cu_seqlens"):
        Layout.of(1, 3, cu_seqlens=torch.tensor(ends))


def test_rotation_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 30, 1, 8) for _ in range(2))
    layout = Layout.of(1, 30)
    products = rotate(q, layout, 100.0)[0, :, 0] @ rotate(k, layout, 100.0)[0, :, 0].T
    for distance in range(5):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products[5, 5], products[5, 2])


@pytest.mark.parametrize("packed", [False, True])
def test_the_convolution_in_pieces_and_packed(packed):
    torch.manual_seed(0)
    conv = ShortConvolution(3, 4, bias=True).double()
    conv.draw()
    x = torch.randn(1, 14, 3, dtype=torch.float64)
    ends = [0, 2, 9, 14]
    whole = torch.cat([conv(x[:, a:b], Layout.of(1, b - a))[0] for a, b in pairwise(ends)], 1)
    if packed:
        layout = Layout.of(1, 14, cu_seqlens=torch.tensor(ends))
        torch.testing.assert_close(conv(x, layout)[0], whole)
    else:
        pieces, kept = [], None
        for a, b in pairwise(ends):
            piece, kept = conv(x[:, a:b], Layout.of(1, b - a), kept)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, 1), conv(x, Layout.of(1, 14))[0])
        assert kept.shape == (1, 3, 3)
        assert not torch.allclose(torch.cat(pieces, 1), whole)


def test_unit_vectors_of_nothing_are_nothing():
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    unit(x).sum().backward()
    assert unit(x).eq(0).all() and x.grad.isfinite().all()
