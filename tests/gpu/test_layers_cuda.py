"""The layers room on CUDA: kernels against float64, the certificates, captured and compiled passes, half precision."""

import pytest
import torch
from torch.nn import functional as F

from vestige.evidence.certify import certify
from vestige.layers.channels.base import Channel
from vestige.layers.mixers.base import Mixer
from vestige.layers.ops import fla, flash_window
from vestige.layers.ops.recurrence import Drive, chunked, recurrence, step
from vestige.layers.ops.windowed_attention import windowed_attention
from vestige.models import VestigeConfig, VestigeLM
from vestige.models.blocks import names_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 300, 4, 64, 64
DECAYS = {
    "none": lambda: None,
    "per head": lambda: -torch.rand(HEADS),
    "per token": lambda: -0.3 * torch.rand(BATCH, LENGTH, HEADS),
    "per channel": lambda: -0.3 * torch.rand(BATCH, LENGTH, HEADS, KEYS),
}


def make(decay, rate, dtype, groups=HEADS, batch=BATCH):
    """A drive on CUDA, and the same numbers in float64."""
    torch.manual_seed(0)
    q = torch.randn(batch, LENGTH, groups, KEYS)
    k = F.normalize(torch.randn(batch, LENGTH, groups, KEYS), dim=-1)
    v = torch.randn(batch, LENGTH, HEADS, VALUES)
    g = DECAYS[decay]()
    g = g if g is None or g.dim() == 1 else g[:batch]
    beta = torch.rand(batch, LENGTH, HEADS) if rate else None
    q, k, v, beta = (None if t is None else t.to(dtype) for t in (q, k, v, beta))
    parts = [None if t is None else t.cuda().requires_grad_() for t in (q, k, v, g, beta)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in parts]
    return Drive(*parts, scale=KEYS**-0.5), Drive(*exact, scale=KEYS**-0.5)


def leaves(drive):
    return [t for t in (drive.q, drive.k, drive.v, drive.decay, drive.beta) if t is not None]


def relative(mine, due):
    return ((mine.double() - due).norm() / due.norm()).item()


@pytest.mark.parametrize("groups", [HEADS, 1])
@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("dispatched", torch.float32),
        ("dispatched", torch.bfloat16),
        ("without fla", torch.bfloat16),
        ("own", torch.float32),
        ("own", torch.bfloat16),
    ],
)
def test_recurrence_forward_and_backward(path, dtype, decay, rate, groups, monkeypatch):
    """Whichever path is taken, in half precision as near to float64 as half precision is."""
    if path == "without fla":
        monkeypatch.setattr(fla, "serves", lambda drive: False)
    drive, exact = make(decay, rate, dtype, groups)
    state = torch.randn(BATCH, HEADS, KEYS, VALUES, device="cuda")
    form = chunked if path == "own" else recurrence
    out, last = form(drive, state)
    due, due_last = chunked(exact, state.double())
    most = 2e-4 if dtype == torch.float32 else 2e-2
    assert relative(out, due) < most and relative(last, due_last) < most
    weight, weight_last = torch.randn_like(due), torch.randn_like(due_last)
    mine = torch.autograd.grad((out * weight).sum() + (last * weight_last).sum(), leaves(drive))
    theirs = torch.autograd.grad((due * weight).sum() + (due_last * weight_last).sum(), leaves(exact))
    for here, there in zip(mine, theirs, strict=True):
        assert relative(here, there) < 2 * most


@pytest.mark.parametrize("path", ["dispatched", "without fla"])
@pytest.mark.parametrize("rate", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_recurrence_packed(decay, rate, path, monkeypatch):
    if path == "without fla":
        monkeypatch.setattr(fla, "serves", lambda drive: False)
    drive, exact = make(decay, rate, torch.bfloat16, batch=1)
    ends = torch.tensor([0, 70, 71, 200, LENGTH], device="cuda")
    starts = torch.zeros(1, LENGTH, dtype=torch.bool, device="cuda")
    starts[0, ends[:-1]] = True
    out, last = recurrence(drive, starts=starts, cu_seqlens=ends)
    due, due_last = chunked(exact, starts=starts)
    assert relative(out, due) < 2e-2 and relative(last, due_last) < 2e-2


def test_which_kernels_serve():
    """Where flash-linear-attention is installed its kernels take half precision, but for what they would get wrong."""
    if not fla._installed():
        pytest.skip("flash-linear-attention is not installed")
    assert fla.serves(make("per channel", False, torch.bfloat16)[0])
    assert fla.serves(make("none", True, torch.bfloat16)[0])
    assert not fla.serves(make("none", True, torch.float32)[0])
    assert not fla.serves(make("per channel", True, torch.bfloat16)[0])
    drive = make("per token", False, torch.bfloat16)[0]
    assert fla.serves(drive) != fla._wrong(drive)
    with torch.no_grad():
        assert fla.serves(drive)


def test_one_step_of_half_precision():
    drive, exact = make("per token", True, torch.bfloat16)
    one, due = (Drive(*(t[:, 0] for t in (d.q, d.k, d.v, d.decay, d.beta)), scale=d.scale) for d in (drive, exact))
    assert relative(step(one)[0], step(due)[0]) < 1e-2


@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.parametrize("case", ["plain", "sink", "always"])
@pytest.mark.parametrize(("length", "window", "dim"), [(1, 128, 64), (100, 128, 64), (3000, 128, 128), (300, 7, 40)])
def test_windows(length, window, dim, case, past):
    """Whatever computes them, answers and slopes in half precision are near those in float64."""
    torch.manual_seed(0)
    held = length + past
    shapes = {"query": (2, 8, length, dim), "key": (2, 2, held, dim), "value": (2, 2, held, dim)}
    if case == "sink":
        shapes["sink"] = (8,)
    if case == "always":
        shapes |= {"asked": (2, 8, length, 24), "keys": (2, 4, 24), "values": (2, 4, dim)}
    parts = {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
    weight = torch.randn(2, 8, length, dim, device="cuda", dtype=torch.float64)

    def run(kind):
        given = {name: t.detach().to(kind).requires_grad_() for name, t in parts.items()}
        q, k, v, *rest = given.values()
        more = {"sink": rest[0]} if case == "sink" else {"always": tuple(rest) if case == "always" else None}
        out = windowed_attention(q, k, v, window=window, scaling=dim**-0.5, **more)
        return out, *torch.autograd.grad((out * weight).sum(), list(given.values()))

    assert flash_window.serves(parts["query"], parts["value"]) == (length >= flash_window.FEWEST)
    for here, there in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (
            here.double() - there
        ).norm() <= 3e-2 * there.norm() + 1e-5  # of one key the share is one, its slope none


@pytest.mark.parametrize("name", [*names_of(Mixer), *names_of(Channel)])
def test_certificate(name):
    certificate = certify(name, device="cuda", behaviour=False)
    assert certificate.holds, str(certificate)


@pytest.mark.parametrize("name", names_of(Mixer))
def test_half_precision_trains(name):
    """On CUDA in bfloat16 the loss of a small model falls, and nothing is lost on the way."""
    torch.manual_seed(0)
    model = VestigeLM(VestigeConfig(blocks=name, num_hidden_layers=2, hidden_size=128, vocab_size=64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(2, 64, (8, 32), device="cuda").repeat(1, 4)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiled():
    model = VestigeLM(VestigeConfig(blocks="gated-delta-net gla softmax", hidden_size=128, vocab_size=64)).cuda()
    text = torch.randint(2, 64, (2, 100), device="cuda")
    compiled = torch.compile(model)
    torch.testing.assert_close(
        compiled(text, use_cache=False).logits, model(text, use_cache=False).logits, atol=1e-3, rtol=1e-3
    )
    compiled(text, labels=text, use_cache=False).loss.backward()


def test_long_texts_take_memory_in_proportion():
    """Reading four times as many tokens takes about four times the memory, for a window too."""
    for name in ("gla", "gated-delta-net", "sliding-window"):
        config = VestigeConfig(blocks=name, hidden_size=256, vocab_size=64, max_position_embeddings=32768)
        model = VestigeLM(config).cuda().bfloat16()
        peaks = []
        for length in (4096, 16384):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            text = torch.randint(2, 64, (1, length), device="cuda")
            model(text, labels=text).loss.backward()
            model.zero_grad(set_to_none=True)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[1] < 5 * peaks[0], (name, peaks)
