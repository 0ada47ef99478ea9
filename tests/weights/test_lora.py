"""Low-rank changes of linear maps."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vestige.weights.lora import Adapters


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Conv1D(4, 7), nn.Linear(4, 3, bias=False))


def adapted(whole: nn.Module, maps: list[nn.Module]) -> Adapters:
    adapters = Adapters(whole, maps, 2, 0.5, torch.Generator().manual_seed(1), "test")
    draw = torch.Generator().manual_seed(2)
    for linear in maps:
        with torch.no_grad():
            second = adapters.matrices(linear)[1]
            second.copy_(torch.randn(second.shape, generator=draw))
    return adapters


def test_a_map_answers_with_the_product_beside_its_weight():
    whole, x = model().double(), torch.randn(6, 2, 5, dtype=torch.float64)
    maps, before = list(whole), whole(x)
    adapters = Adapters(whole, maps, 2, 0.5, torch.Generator(), "test")
    torch.testing.assert_close(whole(x), before)  # as B is zero
    adapters.remove()
    adapters, expected = adapted(whole, maps), x
    for linear in maps:
        first, second = adapters.matrices(linear)
        bias = 0 if linear.bias is None else linear.bias
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        expected = expected @ weight.T + 0.5 * (expected @ first.T) @ second.T + bias
    torch.testing.assert_close(whole(x), expected)
    own = [p for linear in maps for p in adapters.matrices(linear)]
    assert {id(p) for p in whole.parameters() if p.requires_grad} == {id(p) for p in own}
    found, wanted = (torch.autograd.grad(y.square().sum(), own) for y in (whole(x), expected))
    torch.testing.assert_close(found, wanted)
    with adapters.switched_off():
        torch.testing.assert_close(whole(x), before)
    torch.testing.assert_close(whole(x), expected)


def test_what_was_merged_answers_alike_and_nothing_is_left():
    whole, x = model(), torch.randn(6, 5)
    whole[0].bias.requires_grad_(False)
    flags, names = [p.requires_grad for p in whole.parameters()], list(whole.state_dict())
    maps, weights = list(whole), [linear.weight for linear in whole]
    adapters = adapted(whole, maps)
    expected, merged = whole(x), [adapters.merged(linear) for linear in maps]
    adapters.remove()
    adapters.remove()
    assert [p.requires_grad for p in whole.parameters()] == flags and list(whole.state_dict()) == names
    assert all(linear.weight is weight for linear, weight in zip(whole, weights, strict=True))
    assert list(whole) == maps
    with torch.no_grad():
        for weight, value in zip(weights, merged, strict=True):
            weight.copy_(value)
    torch.testing.assert_close(whole(x), expected)
