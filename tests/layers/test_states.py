"""Operators of mixers at their limits: prefix scans of softmax, local linear estimates, partitions of a state."""

from __future__ import annotations

import pytest
import torch

from vestige.errors import SpecError
from vestige.layers.layout import Layout
from vestige.layers.mixers.recurrent import RecurrentLayer
from vestige.layers.mixers.sparse_state_expansion import SparseStateExpansion, largest, uneven
from vestige.layers.ops.local_linear import local_linear_attention
from vestige.layers.ops.softmax_scan import softmax_scan
from vestige.layers.place import Place


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_scores_however_large_have_the_softmax_that_they_have(chunk):
    """Rising, falling and far apart by more than exp can hold, in float32: as the softmax of every beginning."""
    scores = torch.stack([torch.arange(37.0) * 50, -torch.arange(37.0) * 50, 1e4 * draw(37, dtype=torch.float32)])
    scores = scores[..., None].requires_grad_()
    values = draw(3, 37, 1, 2, dtype=torch.float32)
    out, pool = softmax_scan(scores, values, chunk=chunk)
    for t in range(37):
        due = scores[:, : t + 1].softmax(1).mT @ values[:, : t + 1, 0]
        torch.testing.assert_close(out[:, t], due)
    assert bool(torch.autograd.grad(out.sum(), scores)[0].isfinite().all())
    assert torch.equal(pool.peak[:, 0], scores[..., 0].amax(1))


def test_a_large_ridge_leaves_softmax_attention():
    q, k, v = (draw(1, 2, 20, 4, seed=seed) for seed in range(3))
    due = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    far = local_linear_attention(q, k, v, scaling=0.5, ridge=1e9)
    near = local_linear_attention(q, k, v, scaling=0.5, ridge=1e-2)
    torch.testing.assert_close(far, due, atol=1e-6, rtol=1e-6)
    assert float((near - due).abs().max()) > 0.1


def test_a_line_is_told_exactly_where_values_lie_on_one():
    """With hardly any ridge, values that are linear in their keys are told at queries that are no keys; in float32."""
    for dtype, close in ((torch.float64, 1e-5), (torch.float32, 2e-3)):
        q, k, slope = draw(1, 1, 1, 3, dtype=dtype), draw(1, 1, 40, 3, seed=1, dtype=dtype), draw(3, 2, dtype=dtype)
        told = local_linear_attention(q, k, k @ slope + 1, scaling=0.1, ridge=1e-7)
        torch.testing.assert_close(told, q @ slope + 1, atol=close, rtol=close)


def test_nothing_of_length_by_length_is_kept():
    """What is kept for the backward pass grows with the length, not with its square."""
    kept = []
    for length in (128, 256):
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        q, k, v = (draw(1, 1, length, 4, seed=seed).requires_grad_() for seed in range(3))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = local_linear_attention(q, k, v, scaling=0.5, ridge=1.0, chunk=16)
        kept.append(sum(held.values()))
        out.sum().backward()
    assert kept[1] <= 2 * kept[0]


def test_the_router_is_urged_to_use_all_partitions():
    """While training, the gradient of the router is the model's own and that of the loss that evens out."""
    mixer, place = SparseStateExpansion(partitions=3, balance=0.5), Place(hidden_size=16, heads=2)
    torch.manual_seed(0)
    layer = mixer.build(place).double()
    x, valid = draw(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    valid[0, :4] = False
    layout = Layout.of(2, 9, held=valid)

    def slope(training: bool) -> torch.Tensor:
        layer.train(training)
        return torch.autograd.grad(layer(x, layout).square().sum(), layer.router.weight)[0]

    share, touched = layer.route(layout.blank(x))
    loss = uneven(share, touched, valid)
    chosen = (touched[..., None] == torch.arange(3)).any(2)
    often = torch.stack([chosen[valid][:, n].double().mean() for n in range(3)])
    assert loss.item() == pytest.approx(3 * (share[valid].mean(0) * often).sum().item())
    (due,) = torch.autograd.grad(0.5 * loss, layer.router.weight)
    torch.testing.assert_close(slope(True) - slope(False), due)
    even = torch.arange(3)[None, :, None]
    assert uneven(torch.full((1, 3, 3), 1 / 3), even, None).item() == pytest.approx(1.0)


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_sorted_by_partition_they_read_what_one_matrix_gives(active, case):
    """With and without a state that is wanted: outputs and gradients."""
    torch.manual_seed(0)
    layer = SparseStateExpansion(partitions=3, active=active, chunk=4).build(Place(hidden_size=16, heads=2)).double()
    layer.eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    layout = Layout.of(2, 23)
    if case == "padded":
        layout = Layout.of(2, 23, held=torch.arange(23) >= torch.tensor([[0], [7]]))
    if case == "packed":
        layout = Layout.of(1, 23, cu_seqlens=torch.tensor([0, 2, 3, 17, 23]))
    x = draw(*layout.positions.shape, 16).requires_grad_()
    found = []
    for read in (layer(x, layout), RecurrentLayer.forward(layer, x, layout)):
        read = read * (1 if layout.valid is None else layout.valid[..., None])
        found.append([read, *torch.autograd.grad(read.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-7)
    assert layer.route(x)[1].unique().tolist() == [0, 1, 2]


def test_partitions_that_cannot_be():
    with pytest.raises(SpecError, match="'active' is 4; allowed: fewer than partitions, 4"):
        SparseStateExpansion(active=4)
    with pytest.raises(SpecError, match="rows = 9 is more than the 4 rows"):
        SparseStateExpansion(rows=9).build(Place(hidden_size=16, heads=2))
    assert largest(torch.tensor([1.0, 3.0, 2.0]), 2).tolist() == [False, True, True]
