"""Triton kernels of the layers against float64 of their portable forms, forward and backward.

On CUDA; or, what their numbers go, on any machine that has Triton, by its interpreter:

    TRITON_INTERPRET=1 python -m pytest -m gpu tests/gpu/test_kernels_cuda.py
"""

import os

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from vestige.layers.ops.delta_triton import delta_cuda
from vestige.layers.ops.learning.perceptron import twice_gelu, twice_norm
from vestige.layers.ops.learning.scan import _update, _update_back
from vestige.layers.ops.learning.slopes_triton import twice_gelu_cuda, twice_norm_cuda
from vestige.layers.ops.learning.update_triton import update_back_cuda, update_cuda
from vestige.layers.ops.local_linear import by_blocks
from vestige.layers.ops.local_linear_triton import local_linear_cuda
from vestige.layers.ops.recurrence import Drive, chunked
from vestige.layers.ops.recurrence_triton import recurrence_cuda
from vestige.layers.ops.softmax_scan import Pool, chunked_scan
from vestige.layers.ops.softmax_scan_triton import softmax_scan_cuda
from vestige.models import VestigeConfig, VestigeLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or Triton's interpreter"),
]
MOST = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def compare(kernel, portable, parts, most):
    """Outputs and gradients of the kernel beside those of the portable form in float64.

    Args:
        kernel, portable: take ``parts`` by name and return tensors.
        parts: tensors by name, or ``None``.
        most: that they may differ by, relative to their size.
    """

    def run(form, kinds):
        leaves = {n: None if t is None else kinds(t).detach().clone().requires_grad_() for n, t in parts.items()}
        given = form(**leaves)
        torch.manual_seed(1)
        loss = sum((g.double() * torch.randn(g.shape, dtype=torch.float64).to(DEVICE)).sum() for g in given)
        wanted = {n: t for n, t in leaves.items() if t is not None}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {str(n): t for n, t in enumerate(given)} | dict(zip(wanted, found, strict=True))

    mine, due = run(kernel, lambda t: t), run(portable, lambda t: t.double())
    for name, there in due.items():
        here = mine[name]
        assert here.isfinite().all(), name
        if there is not None:
            error, size = (here.double() - there).norm(), there.norm()
            assert error <= most * size + 1e-6, f"{name}: {error:.2e} of {size:.2e}"


def sequences(batch, length, *firsts):
    """Where packed texts begin, by row."""
    starts = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
    for row, first in enumerate(firsts):
        starts[row, torch.tensor([n for n in first if n < length], device=DEVICE)] = True
    return starts


@pytest.mark.parametrize(
    ("decay", "keys", "groups", "length", "packed"),
    [
        ("none", 64, 2, 130, True),
        ("per head", 20, 1, 64, False),
        ("fixed", 20, 2, 70, True),
        ("per token", 64, 2, 130, True),
        ("per token", 16, 1, 70, False),
        ("per channel", 40, 2, 130, True),
        ("per channel", 200, 1, 70, False),
        ("uneven", 40, 1, 130, True),
        ("strong", 64, 2, 100, False),
    ],
)
def test_recurrence(decay, keys, groups, length, packed):
    """Every kind of decay, shared and wide keys, lengths that fill no chunk, packed texts or a state carried in."""
    torch.manual_seed(0)
    batch, heads, values = 2, 2, 48
    token = (batch, length, heads)
    draws = {
        "none": lambda: None,
        "per head": lambda: -torch.rand(heads),
        "fixed": lambda: -torch.rand(heads),
        "per token": lambda: -0.3 * torch.rand(token),
        "per channel": lambda: -0.3 * torch.rand(*token, keys),
        "uneven": lambda: -torch.linspace(0.01, 6, length)[:, None, None] * torch.rand(*token, keys),
        "strong": lambda: -30 * torch.rand(*token, keys),
    }
    fade = draws[decay]()
    parts = {
        "q": torch.randn(batch, length, groups, keys).bfloat16(),
        "k": F.normalize(torch.randn(batch, length, groups, keys), dim=-1).bfloat16(),
        "v": torch.randn(*token, values).bfloat16(),
        "decay": fade,
        "state": None if packed else torch.randn(batch, heads, keys, values),
    }
    parts = {name: None if t is None else t.to(DEVICE) for name, t in parts.items()}
    fixed = {"scale": 0.3, **({"decay": parts.pop("decay")} if decay == "fixed" else {})}  # nobody wants its slope
    starts = sequences(batch, length, [0, 64, 65], [0, 10, 129]) if packed else None
    compare(
        lambda state, **drive: recurrence_cuda(Drive(**drive, **fixed), state, starts),
        lambda state, **drive: chunked(Drive(**drive, **fixed), state, starts=starts),
        parts,
        0.1 if decay == "strong" else MOST[torch.bfloat16],  # its slope is a difference of large numbers
    )


@pytest.mark.parametrize(
    ("decay", "keys", "groups", "length", "packed"),
    [
        ("none", 16, 2, 64, False),
        ("none", 128, 2, 300, True),
        ("per head", 20, 1, 64, False),
        ("per token", 16, 1, 70, False),
        ("per token", 64, 2, 130, True),
        ("per token", 128, 1, 1000, False),
        ("per token", 200, 1, 70, False),
        ("strong", 40, 2, 100, False),
    ],
)
def test_delta_rule(decay, keys, groups, length, packed):
    """Keys that are near to each other, so that tokens of a chunk correct each other; else as above."""
    torch.manual_seed(0)
    batch, heads, values = 80 if length == 1000 and DEVICE == "cuda" else 2, 2, 48  # many rows are walked in wide tiles
    token = (batch, length, heads)
    draws = {
        "none": lambda: None,
        "per head": lambda: -torch.rand(heads),
        "per token": lambda: -0.3 * torch.rand(token),
        "strong": lambda: -30 * torch.rand(token),
    }
    parts = {
        "q": torch.randn(batch, length, groups, keys).bfloat16(),
        "k": F.normalize(torch.randn(batch, length, groups, keys) + 0.5, dim=-1).bfloat16(),
        "v": torch.randn(*token, values).bfloat16(),
        "decay": draws[decay](),
        "beta": torch.rand(token).bfloat16(),
        "state": None if packed else torch.randn(batch, heads, keys, values),
    }
    parts = {name: None if t is None else t.to(DEVICE) for name, t in parts.items()}
    starts = sequences(batch, length, [0, 64, 65], [0, 10, 129]) if packed else None
    compare(
        lambda state, **drive: delta_cuda(Drive(**drive, scale=0.3), state, starts),
        lambda state, **drive: chunked(Drive(**drive, scale=0.3), state, starts=starts),
        parts,
        MOST[torch.bfloat16],
    )


@pytest.mark.parametrize("case", ["plain", "padded", "packed", "carried"])
@pytest.mark.parametrize(("length", "dim"), [(1, 16), (64, 80), (130, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_scan(dtype, length, dim, case):
    torch.manual_seed(0)
    batch, heads = 2, 3
    parts = {
        "scores": 4 * torch.randn(batch, length, heads),
        "values": torch.randn(batch, length, heads, dim).to(dtype),
        "weight": 1 + torch.rand(batch, heads) if case == "carried" else None,
        "total": torch.randn(batch, heads, dim) if case == "carried" else None,
    }
    parts = {name: None if t is None else t.to(DEVICE) for name, t in parts.items()}
    peak = 3 * torch.randn(batch, heads, device=DEVICE)
    valid = torch.rand(batch, length, device=DEVICE) < 0.7 if case == "padded" else None
    if valid is not None:
        valid[0, : length // 2 + 1] = False
    starts = sequences(batch, length, [0, 64, 65], [0, 10, 129]) if case == "packed" else None

    def with_pool(form):
        def run(scores, values, weight, total):
            pool = None if weight is None else Pool(peak.to(weight), weight, total)
            out, after = form(scores, values, pool)
            return out, after.weight, after.total

        return run

    compare(
        with_pool(lambda scores, values, pool: softmax_scan_cuda(scores, values, pool, valid, starts)),
        with_pool(lambda scores, values, pool: chunked_scan(scores, values, pool, valid=valid, starts=starts)),
        parts,
        MOST[dtype],
    )


@pytest.mark.parametrize(
    ("length", "past", "dim", "width", "case"),
    [(50, 0, 24, 40, "plain"), (33, 20, 16, 16, "padded"), (70, 0, 64, 32, "packed")],
)
def test_local_linear_attention(length, past, dim, width, case):
    """Keys shared by heads, keys of before, padding, packed texts."""
    torch.manual_seed(0)
    batch, heads, groups, held = 2, 4, 2, length + past
    parts = {
        "query": torch.randn(batch, heads, length, dim),
        "key": torch.randn(batch, groups, held, dim),
        "value": torch.randn(batch, groups, held, width),
    }
    parts = {name: t.bfloat16().to(DEVICE) for name, t in parts.items()}
    settings = {
        "scaling": dim**-0.5,
        "ridge": 5.0,
        "iterations": 64,
        "valid": torch.rand(batch, held).to(DEVICE) < 0.7 if case == "padded" else None,
        "sequence": (torch.rand(batch, held) < 0.1).cumsum(1).to(DEVICE) if case == "packed" else None,
    }
    compare(
        lambda **given: (local_linear_cuda(**given, **settings),),
        lambda **given: (by_blocks(**given, **settings),),
        parts,
        MOST[torch.bfloat16],
    )


def near(here, there, most=MOST[torch.float32]):
    """Whether each of some tensors is near another in float64."""
    for mine, due in zip(here, there, strict=True):
        assert due.dtype == torch.float64 and (mine.double() - due).norm() <= most * due.norm() + 1e-6


@pytest.mark.parametrize(("tokens", "height", "width"), [(1, 16, 32), (50, 70, 24), (64, 32, 128)])
def test_what_a_memory_holds_after_a_block(tokens, height, width):
    torch.manual_seed(0)
    before, d_after = ([torch.randn(4, height, width, device=DEVICE) for _ in range(2)] for _ in range(2))
    rest = [torch.randn(4, tokens, height), torch.randn(4, tokens, width), torch.rand(3, 4)]
    rest = [t.to(DEVICE) for t in (*rest, torch.rand(4, tokens), torch.rand(4, tokens))]

    def double(tensors):
        return [t.double() for t in tensors]

    here, there = [torch.empty_like(t) for t in before], [torch.empty_like(t).double() for t in before]
    update_cuda(before, *rest, here)
    _update(double(before), *double(rest), there)
    near(here, there)
    for beside in ([], [torch.randn_like(t) for t in before]):
        held, left = update_back_cuda(before, rest[2], d_after, beside)
        due_held, due_left = _update_back(double(before), rest[2].double(), double(d_after), double(beside))
        near([*held, left.sum(0)], [*due_held, due_left.sum(0)])


@pytest.mark.parametrize("shape", [(2, 3, 5, 24), (1, 2, 64, 128)])
def test_slopes_of_a_memory(shape):
    """What slopes through GELU and through a norm depend on; the derivatives in float64 are PyTorch's own."""
    torch.manual_seed(0)
    u, slope, x = (torch.randn(shape, device=DEVICE) for _ in range(3))
    x = 2 * x + 0.5
    given = [t.double().requires_grad_() for t in (slope, x)]
    found = torch.autograd.grad(torch.ops.aten.gelu_backward(*given), given, u.double())
    near(twice_gelu_cuda(u, slope, x), found)
    near(twice_gelu(*(t.double() for t in (u, slope, x))), found)
    _, *moments = torch.native_layer_norm(given[1], shape[-1:], None, None, 1e-5)
    normed = torch.nn.functional.layer_norm(given[1], shape[-1:])
    (through,) = torch.autograd.grad(normed, given[1], given[0], create_graph=True)
    found = torch.autograd.grad(through, given, u.double())
    moments = [t.detach() for t in moments]
    near(twice_norm_cuda(u, slope, x, *(t.float() for t in moments)), found)
    near(twice_norm(u.double(), *(t.detach() for t in given), *moments), found)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in ("aaren", "gla", "sparse-state-expansion", "local-linear-attention", "titans")),
        *((name, False) for name in ("delta-net", "gated-delta-net", "sliding-window", "lizard", "titans-mag")),
        *((name, True) for name in ("aaren", "gla", "local-linear-attention", "sliding-window", "lizard")),
    ],
)
def test_layers_take_the_kernels(name, compiled):
    """A model's logits and gradients in half precision are near those in float64, compiled or not."""
    torch.manual_seed(0)
    config = VestigeConfig(blocks=name, num_hidden_layers=1, hidden_size=128, vocab_size=64)
    exact = VestigeLM(config).to(DEVICE).double()
    half = VestigeLM(config).to(DEVICE)
    half.load_state_dict(exact.state_dict())
    half = half.bfloat16()
    text = torch.randint(2, 64, (2, 150), device=DEVICE)
    run = torch.compile(half) if compiled else half
    mine, due = (model(text, labels=text, use_cache=False) for model in (run, exact))
    mine.loss.backward()
    due.loss.backward()
    assert (mine.logits.double() - due.logits).norm() < 0.05 * due.logits.norm()
    here, there = (torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (half, exact))
    assert (here - there).norm() < 0.1 * there.norm()
