"""Checks for mixers and channel mixers as layers: the reference, and that no form of the computation changes anything.

Layers of a few channels in float64 see a few dozen tokens, in chunks of eight, so that every edge is met. What they do
in a whole model is looked at in :mod:`vestige.evidence.certify.layers_model`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vestige.errors import SpecError
from vestige.evidence.certify.mixing import HIDDEN, LayerCase, feed, forms
from vestige.evidence.certify.suite import Seen, Suite, expect, refused
from vestige.evidence.references import reference_of
from vestige.evidence.tasks.recall import PairRecall
from vestige.layers.channels.base import Channel
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place

mixers = Suite(Mixer, case=LayerCase)
channels = Suite(Channel, case=LayerCase)
for _suite in (mixers, channels):
    _suite.not_applicable("undo", "a layer is part of the model that is built with it: there is nothing to take back")
channels.not_applicable("bytes", "a channel mixer holds nothing between tokens")

LENGTH = 21
PIECES = (7, 1, 1, 9, 3)
EXACT = 1e-9


def close(mine: Tensor, due: Tensor, what: str, tolerance: float = EXACT) -> float:
    """Compare tensors of the order of one; the largest difference."""
    expect(mine.shape == due.shape, f"{what}: the shape is {tuple(mine.shape)}, and {tuple(due.shape)} is due")
    largest = float((mine - due).detach().abs().max()) if mine.numel() else 0.0
    expect(largest <= tolerance, f"{what}: the largest difference is {largest:.3g}, more than {tolerance:g}")
    return largest


def whole(layer: nn.Module, x: Tensor) -> Tensor:
    """The output for tokens given at once, without a state."""
    return layer(x, Layout.of(*x.shape[:2], device=x.device)) if hasattr(layer, "mixer") else layer(x)


def due(method: Any, layer: nn.Module, x: Tensor, place: Place) -> Tensor:
    """The reference's output, row by row."""
    module = reference_of(method.name)
    expect(module is not None, f"there is no reference for {method.name!r}")
    weights = {name: weight.cpu() for name, weight in layer.named_parameters()}
    settings = {name: getattr(method, name) for name in method.parameters() if name != "chunk"}
    rows = [module.mix(row, weights, place, **settings) for row in x.cpu()]  # type: ignore[union-attr]
    return torch.stack(rows).to(x.device)


@mixers.check("reference")
@channels.check("reference")
def every_form_is_the_reference(case: LayerCase) -> Seen:
    """In float64 the layer gives what the reference gives, for each choice among its parameters and two depths."""
    largest, tried = 0.0, 0
    for method in forms(case.fitted):
        for index in (0, 2):
            place = case.place(index)
            layer = case.layer(method, place)
            x = case.x(2, LENGTH)
            with torch.no_grad():
                what = f"{method.to_json()} in layer {index}"
                largest = max(largest, close(whole(layer, x), due(method, layer, x, place), what))
            tried += 1
    return {"largest difference": largest, "forms": tried}


@mixers.check("reference")
@channels.check("reference")
def gradients_are_the_references(case: LayerCase) -> Seen:
    """The gradients of inputs and of every weight are those that autograd finds through the reference."""
    layer, place = case.layer(), case.place()
    x = case.x(2, LENGTH).requires_grad_()
    weight = case.x(2, LENGTH, seed=1)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad((weight * whole(layer, x)).sum(), leaves)
    theirs = torch.autograd.grad((weight * due(case.fitted, layer, x, place)).sum(), leaves)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    largest = 0.0
    for name, here, there in zip(names, mine, theirs, strict=True):
        expect(bool(there.abs().max() > 0), f"the reference does not depend on {name}")
        size = max(1.0, float(there.abs().max()))
        largest = max(largest, close(here / size, there / size, f"gradient of {name}"))
    return {"largest difference": largest, "weights": len(names) - 1}


@mixers.check("reference")
@channels.check("reference")
def gradients_are_slopes(case: LayerCase) -> Seen:
    """In float64 every gradient is the slope that small changes of inputs and weights show (gradcheck)."""
    method = case.fitted.replace(chunk=4) if "chunk" in case.method.parameters() else case.fitted
    layer = case.layer(method)
    x = case.x(1, 7).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    weights = [weight.detach().requires_grad_() for weight in layer.parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        arguments = (x, Layout.of(1, 7, device=x.device)) if hasattr(layer, "mixer") else (x,)
        return functional_call(layer, dict(zip(names, weights, strict=True)), arguments)

    fits = torch.autograd.gradcheck(run, (x, *weights), fast_mode=True, raise_exception=False)
    expect(fits, "a gradient is not the slope that small changes show")
    return {"weights": len(names)}


@mixers.check("invariance")
def in_pieces_as_in_one(case: LayerCase) -> Seen:
    """Chunks, single steps and pieces with a state between them give the same outputs and leave the same state."""
    layer, x = case.layer(), case.x(2, LENGTH)
    largest = 0.0
    with torch.no_grad():
        once = whole(layer, x)
        states = []
        for pieces in ((LENGTH,), (1,) * LENGTH, PIECES):
            outputs, state = feed(layer, x, pieces)
            largest = max(largest, close(outputs, once, f"pieces of {pieces}"))
            states.append(state)
    for state in states[1:]:
        for name, tensor in state.tensors.items():
            largest = max(largest, close(tensor, states[0].tensors[name], f"state {name!r}"))
    return {"largest difference": largest, "state": {n: tuple(t.shape[1:]) for n, t in states[0].tensors.items()}}


@mixers.check("invariance")
def gradients_cross_the_pieces(case: LayerCase) -> Seen:
    """Fed in pieces, early inputs receive the gradient that they receive when all is fed at once."""
    layer, weight = case.layer(), case.x(2, LENGTH, seed=1)
    gradients = []
    for pieces in (None, PIECES):
        x = case.x(2, LENGTH).requires_grad_()
        y = whole(layer, x) if pieces is None else feed(layer, x, pieces)[0]
        gradients.append(torch.autograd.grad((weight * y).sum(), x)[0])
    return {"largest difference": close(gradients[1], gradients[0], "gradient of the input", 1e-8)}


@mixers.check("invariance")
def nothing_looks_ahead(case: LayerCase) -> Seen:
    """For lengths around the edges of chunks, the output of a beginning is the beginning of the output."""
    layer, x = case.layer(), case.x(2, 34)
    lengths = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33)
    with torch.no_grad():
        once = whole(layer, x)
        largest = max(close(whole(layer, x[:, :n]), once[:, :n], f"the first {n} tokens") for n in lengths)
    return {"largest difference": largest, "lengths": len(lengths)}


@channels.check("invariance")
def each_token_is_on_its_own(case: LayerCase) -> Seen:
    """A token's output does not depend on any other token."""
    layer, x = case.layer(), case.x(2, LENGTH)
    with torch.no_grad():
        once = layer(x)
        alone = torch.stack([layer(x[:, n : n + 1])[:, 0] for n in range(LENGTH)], 1)
    return {"largest difference": close(alone, once, "tokens one by one")}


@mixers.check("invariance")
def left_padded_rows_are_as_alone(case: LayerCase) -> Seen:
    """Rows padded on the left give what they give alone, at once and in pieces; padding has no gradient."""
    layer, lengths = case.layer(), (LENGTH, 13, 2)
    x = case.x(len(lengths), LENGTH) * 3
    held = torch.arange(LENGTH)[None, :] >= LENGTH - torch.tensor(lengths)[:, None]
    held = held.to(x.device)
    largest = 0.0
    with torch.no_grad():
        once = layer(x, Layout.of(len(lengths), LENGTH, device=x.device, held=held))
        outputs = [once, feed(layer, x, PIECES, held)[0]]
        for row, length in enumerate(lengths):
            alone = whole(layer, x[row : row + 1, LENGTH - length :])
            for padded in outputs:
                largest = max(largest, close(padded[row : row + 1, LENGTH - length :], alone, f"row of {length}"))
    x.requires_grad_()
    y = layer(x, Layout.of(len(lengths), LENGTH, device=x.device, held=held))
    (gradient,) = torch.autograd.grad(y[held].square().sum(), x)
    expect(bool(gradient.isfinite().all()), "gradients with padding are not finite")
    expect(float(gradient[~held].abs().max()) == 0, "real tokens depend on padding")
    return {"largest difference": largest}


@mixers.check("invariance")
def packed_sequences_are_as_alone(case: LayerCase) -> Seen:
    """Sequences packed into one row give what they give alone, of one token too; no gradient crosses an edge."""
    layer, x = case.layer(), case.x(1, LENGTH).requires_grad_()
    ends = [0, 5, 6, 16, LENGTH]
    layout = Layout.of(1, LENGTH, device=x.device, cu_seqlens=torch.tensor(ends, device=x.device))
    packed = layer(x, layout)
    largest = 0.0
    for first, last in pairwise(ends):
        with torch.no_grad():
            alone = whole(layer, x[:, first:last])
        largest = max(largest, close(packed[:, first:last], alone, f"tokens {first} to {last}"))
        (gradient,) = torch.autograd.grad(packed[:, first:last].square().sum(), x, retain_graph=True)
        outside = torch.cat([gradient[:, :first], gradient[:, last:]], 1)
        close(outside, torch.zeros_like(outside), f"gradient of tokens {first} to {last} in other sequences", 1e-12)
    return {"largest difference": largest, "sequences": len(ends) - 1}


@mixers.check("invariance")
@channels.check("invariance")
def lower_precision_is_close(case: LayerCase) -> Seen:
    """In float32 and bfloat16 outputs and gradients are finite and near those in float64."""
    x, seen = case.x(2, 40), {}
    exact = case.layer()
    truth = whole(exact, x).detach()
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        layer = case.layer(dtype=dtype)
        y = whole(layer, x.to(dtype))
        y.square().sum().backward()
        finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
        expect(y.dtype == dtype, f"in {dtype} the output is {y.dtype}")
        expect(bool(y.isfinite().all()) and finite, f"in {dtype} something is not finite")
        error = float((y.detach().double() - truth).norm() / truth.norm())
        expect(error <= most, f"in {dtype} the relative error is {error:.3g}, more than {most:g}")
        seen[f"relative error in {str(dtype).removeprefix('torch.')}"] = error
    return seen


@mixers.check("invariance")
def large_inputs_stay_finite(case: LayerCase) -> Seen:
    """Inputs a hundred times too large, which shut every gate or open it, give finite outputs and gradients."""
    layer = case.layer(dtype=torch.float32)
    x = (100 * case.x(2, 40)).float().requires_grad_()
    y = whole(layer, x)
    y.sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    expect(bool(y.isfinite().all()), "outputs are not finite")
    expect(all(g is not None and bool(g.isfinite().all()) for g in gradients), "gradients are not finite")
    return {"largest output": float(y.detach().abs().max())}


@mixers.check("behaviour", slow=True)
def what_was_said_is_remembered(case: LayerCase) -> Seen:
    """Trained for a second, it answers with what was said among noise; without a past it answers at chance."""
    task = PairRecall(pairs=1, noise=3)
    right, blind = (case.recall(task, steps=100, blind=blind) for blind in (False, True))
    seen = {"right answers": right, "without a past": blind, "chance": task.chance}
    expect(min(right) > max(blind) + 0.3, f"it hardly remembers: {seen}")
    return seen


@channels.check("behaviour", slow=True)
def what_a_linear_map_cannot_do_is_learnt(case: LayerCase) -> Seen:
    """Trained for a second, it fits the product of two inputs; the best linear map explains none of it."""
    seen = [_unexplained(case, seed) for seed in case.seeds]
    expect(max(seen) < 0.5, f"of the variance it leaves {seen}; a linear map leaves all")
    return {"variance left over": seen, "by the best linear map": 1.0}


def _unexplained(case: LayerCase, seed: int) -> float:
    """The share of a product's variance that a trained layer leaves over on new points."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = case.fitted.build(case.place())
        for weight in layer.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        layer = layer.to(case.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for step in range(301):
        x = torch.randn(1, 256, HIDDEN, generator=generator).to(case.device)
        target = x[..., 0] * x[..., 1]
        loss = (layer(x)[..., 0] - target).square().mean() / target.var()
        if step < 300:  # the last points are for looking only
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(loss.detach())


@mixers.check("bad input")
def sizes_that_do_not_divide_are_refused(case: LayerCase) -> Seen:
    """A width that nothing divides raises SpecError with the numbers, before anything is allocated."""
    counted: list[nn.Module] = []
    original = nn.Module.register_parameter

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        counted.append(self)
        original(self, *args, **kwargs)

    nn.Module.register_parameter = counting  # type: ignore[method-assign]
    try:
        wide = case.place(hidden_size=HIDDEN + 1)
        text = refused(SpecError, lambda: case.fitted.build(wide), case.method.name, "does not divide")
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
    expect(not counted, "weights were allocated before the refusal")
    return {"refused": text}
