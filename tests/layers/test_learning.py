"""The engine of memories that learn: pieces are wholes for every rule, and its parts are what they say."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vestige.layers.ops.learning import engine, muon
from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.engine import Lesson, Rule, Slow, learn
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.retentions import Retention
from vestige.layers.ops.learning.steps import Features, newton_schulz, width_of

BATCH, LENGTH, HEADS, DIM = 2, 19, 2, 6
RULES = {
    "plain": Rule(refresh=4),
    "matrix": Rule(refresh=5, memory=Perceptron(depth=1, residual=False)),
    "three layers": Rule(refresh=4, memory=Perceptron(depth=3, expand=2)),
    "window beyond a block": Rule(refresh=4, window=7),
    "q-norm": Rule(refresh=4, retention=Retention("q-norm")),
    "shares, by block": Rule(refresh=4, retention=Retention("kl"), by_block=True),
    "muon": Rule(refresh=4, muon=3, window=3),
    "muon by block": Rule(refresh=4, muon=3, window=3, by_block=True),
    "powers": Rule(refresh=4, feature="powers", degree=2),
}


def drawn(*shape):
    return torch.randn(BATCH, LENGTH, HEADS, *shape, dtype=torch.float64)


def lesson():
    torch.manual_seed(0)
    unit = [F.normalize(drawn(DIM), dim=-1) for _ in range(2)]
    fade, flow = F.logsigmoid(drawn() + 2), F.logsigmoid(drawn())
    return Lesson(*unit, drawn(DIM), 0.3 * torch.sigmoid(drawn()), fade, flow, torch.sigmoid(drawn()))


def slow(rule):
    torch.manual_seed(1)
    inputs = width_of(rule.feature, DIM, rule.degree)
    start = [0.4 * torch.randn(HEADS, *shape, dtype=torch.float64) for shape in rule.memory.shapes(inputs, DIM)]
    return Slow(start, torch.ones(HEADS, 1, DIM).double(), torch.ones(rule.degree + 1).double())


def part(whole, first, last):
    return Lesson(
        **{f.name: None if (t := getattr(whole, f.name)) is None else t[:, first:last] for f in fields(whole)}
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (6, 1, 1, 8, 3)])
def test_pieces_are_the_whole(name, pieces):
    rule, told = RULES[name], lesson()
    at_once, in_pieces, read, past = {}, {}, [], 0
    whole = learn(rule, slow(rule), told, at_once)
    for count in pieces:
        read.append(learn(rule, slow(rule), part(told, past, past + count), in_pieces))
        past += count
    torch.testing.assert_close(torch.cat(read, 1), whole, atol=1e-10, rtol=0)
    assert at_once.keys() == in_pieces.keys()
    for key, held in at_once.items():
        torch.testing.assert_close(in_pieces[key], held, atol=1e-10, rtol=0)


DERIVED = {
    **{name: RULES[name] for name in ("plain", "window beyond a block", "q-norm")},
    **{name: Rule(refresh=4, bias=Bias(name)) for name in ("lp", "huber")},
    "cubes by block": Rule(refresh=4, retention=Retention("q-norm", 3.0), by_block=True),
    "shares": Rule(refresh=4, retention=Retention("kl"), window=3),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derivatives_are_slopes(name, monkeypatch):
    """Of answers and of what is held: after padding, in two passes, two blocks at a time; of some without momentum."""
    rule, told, count = DERIVED[name], part(lesson(), 0, 11), 11
    begun = slow(rule)
    held = 2 * BATCH * sum(weight.nbytes for weight in begun.start)
    monkeypatch.setattr(engine, "HELD_AT_ONCE", {"cpu": 2 * held})
    valid = torch.ones(BATCH, count, dtype=torch.bool)
    valid[0, :3] = False
    gates = {f.name: getattr(told, f.name) for f in fields(told)} | {"bound": 1 + torch.rand_like(told.rate)}
    gates = {n: t if n in "qkv" else t.masked_fill(~valid[..., None], 0) for n, t in gates.items()}
    if name in ("plain", "shares"):
        del gates["momentum"]
    names = list(gates)

    def run(*given):
        whole, held = Lesson(**dict(zip(names, given, strict=False))), {}
        first = Slow(list(given[len(names) : -2]), *given[-2:])
        read = [
            learn(rule, first, part(whole, *ends), held, valid=valid[:, slice(*ends)]) for ends in ((0, 9), (9, 11))
        ]
        return torch.cat(read, 1) * valid[..., None, None], *(t for t in held.values() if t.requires_grad)

    leaves = [*gates.values(), *begun.start, begun.gain, begun.scale]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-5)


def test_blocks_that_leave_much_are_worked_out_again(monkeypatch):
    rule, start, found = RULES["muon by block"], [t.requires_grad_() for t in slow(RULES["muon by block"]).start], []

    def again(run, *given, **how):
        calls.append(run)
        return checkpoint(run, *given, **how)

    monkeypatch.setattr(muon, "checkpoint", again)
    for most, count in ((1 << 32, 0), (0, 5)):
        calls = []
        monkeypatch.setattr(muon, "MOST_LEFT", most)
        read = learn(rule, Slow(start, torch.ones(HEADS, 1, DIM).double()), lesson(), {})
        found.append(torch.autograd.grad(read.square().sum(), start))
        assert len(calls) == count
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_one_layer_with_squares_is_the_delta_rule():
    from vestige.layers.ops.recurrence import Drive, chunked

    torch.manual_seed(0)
    told = lesson()
    rate = torch.rand(BATCH, LENGTH, HEADS, dtype=torch.float64) / 2
    told = Lesson(told.q, told.k, told.v, rate, torch.zeros_like(rate))
    rule = Rule(refresh=1, memory=Perceptron(depth=1, residual=False))
    nothing = Slow([torch.zeros(HEADS, DIM, DIM).double()], torch.ones(HEADS, 1, DIM).double())
    due, _ = chunked(Drive(told.q, told.k, told.v, beta=2 * rate))
    torch.testing.assert_close(learn(rule, nothing, told, {}), due, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["l2", "lp", "huber", "dot"])
def test_slopes_are_those_of_the_loss(name):
    torch.manual_seed(0)
    answer = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    value, bound = torch.randn(7, DIM, dtype=torch.float64), torch.full((7,), 2.0, dtype=torch.float64)
    error = answer - value
    size = error.norm(dim=-1)
    loss = {
        "l2": size.square(),
        "lp": error.abs().pow(3).sum(-1),
        "huber": torch.where(size <= bound, size.square() / 2, bound * size),
        "dot": -(answer * value).sum(-1),
    }[name]
    (due,) = torch.autograd.grad(loss.sum(), answer)
    torch.testing.assert_close(Bias(name).slope(error.detach(), value, bound), due, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_a_step_is_as_large_in_every_direction(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = left @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2, 0.1]).double()) @ right
    found = newton_schulz(matrix, 5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    assert newton_schulz(torch.zeros(shape), 5).eq(0).all()


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_features_multiply_to_powers(degree):
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, dtype=torch.float64)
    feature = Features.of("polynomial", 5, degree, x)
    scale = torch.tensor([1 / math.sqrt(math.factorial(n)) for n in range(degree + 1)]).double()
    due = sum((x @ y) ** n / math.factorial(n) for n in range(degree + 1))
    assert feature.which.shape[0] == width_of("polynomial", 5, degree)
    torch.testing.assert_close(feature(x, scale) @ feature(y, scale), due, atol=1e-6, rtol=1e-6)


def test_shares_and_norms():
    torch.manual_seed(0)
    total = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    shares = Retention("kl", mass=3.0).weights(total)
    torch.testing.assert_close(shares.sum(-2), torch.full((2, 3, 4), 3.0).double())
    weights = Retention("q-norm", power=4.0).weights(total)
    norm = total.abs().pow(4).sum((-2, -1), keepdim=True).pow(0.25)
    torch.testing.assert_close(weights, total / norm.square())
    assert Retention("q-norm").weights(1e30 * torch.ones(1, 3, 3)).isfinite().all()
