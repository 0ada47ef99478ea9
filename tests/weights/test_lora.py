"""Low-rank changes of linear maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vestige.weights.lora import Adapters


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Conv1D(4, 7), nn.Linear(4, 3, bias=False))


def adapted(whole: nn.Module, scale: float = 0.5) -> Adapters:
    adapters = Adapters(whole, list(whole), 2, scale, torch.Generator().manual_seed(1), "test")
    draw = torch.Generator().manual_seed(2)
    for linear in whole:
        with torch.no_grad():
            second = adapters.matrices(linear)[1]
            second.copy_(torch.randn(second.shape, generator=draw))
    return adapters


def test_a_map_answers_with_the_product_beside_its_weight():
    whole, x = model().double(), torch.randn(6, 2, 5, dtype=torch.float64)
    before = whole(x)
    adapters = Adapters(whole, list(whole), 2, 0.5, torch.Generator(), "test")
    torch.testing.assert_close(whole(x), before)  # as B is zero
    adapters.remove()
    adapters, expected = adapted(whole), x
    for linear in whole:
        first, second = adapters.matrices(linear)
        bias = 0 if linear.bias is None else linear.bias
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        expected = expected @ weight.T + 0.5 * (expected @ first.T) @ second.T + bias
    torch.testing.assert_close(whole(x), expected)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.low_rank_{side}" for n in range(3) for side in "ab"}
    own = [p for linear in whole for p in adapters.matrices(linear)]
    found, wanted = (torch.autograd.grad(y.square().sum(), own) for y in (whole(x), expected))
    torch.testing.assert_close(found, wanted)
    with adapters.switched_off():
        torch.testing.assert_close(whole(x), before)
    torch.testing.assert_close(whole(x), expected)


def test_what_was_merged_answers_alike_and_nothing_is_left():
    whole, x = model(), torch.randn(6, 5)
    whole[0].bias.requires_grad_(False)
    flags, names = [p.requires_grad for p in whole.parameters()], list(whole.state_dict())
    weights = [linear.weight for linear in whole]
    adapters = adapted(whole)
    expected, merged = whole(x), [adapters.merged(linear) for linear in whole]
    adapters.remove()
    adapters.remove()
    assert [p.requires_grad for p in whole.parameters()] == flags and list(whole.state_dict()) == names
    assert all(linear.weight is weight for linear, weight in zip(whole, weights, strict=True))
    assert not any("forward" in vars(linear) for linear in whole)
    with torch.no_grad():
        for weight, value in zip(weights, merged, strict=True):
            weight.copy_(value)
    torch.testing.assert_close(whole(x), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_the_sum_is_made_in_the_weights_own_precision(kind):
    whole = nn.Sequential(nn.Linear(4, 4, bias=False)).to(kind)
    with torch.no_grad():
        whole[0].weight.copy_(torch.eye(4))
    adapters = Adapters(whole, list(whole), 1, 1.0, torch.Generator(), "test")
    first, second = adapters.matrices(whole[0])
    assert first.dtype == second.dtype == kind
    with torch.no_grad():
        first.fill_(1.0)
        second.fill_(2.0**-12)  # no 16-bit float lies between 1 and 1 + 2^-8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapters.merged(whole[0]).dtype == kind
        assert float(adapters.merged(whole[0])[0, 0]) == 1 + (2.0**-12 if kind == torch.float32 else 0)
        assert whole(torch.ones(1, 4, dtype=kind)).dtype == torch.bfloat16
