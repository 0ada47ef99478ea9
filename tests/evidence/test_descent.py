"""Small models are trained the same way one by one, and in turns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vestige.errors import TrainingError
from vestige.evidence.descent import Descent, descend, descend_together

STEPS, RATE = 6, 0.1


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def draw(chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 3, generator=chance)
    return x, x.sum(1, keepdim=True)


def descent(net: nn.Module, seed: int, steps: int = STEPS) -> Descent:
    return Descent(net, draw, lambda x, y: (net(x) - y).square().mean(), steps=steps, rate=RATE, seed=seed)


def test_in_turns_is_one_by_one() -> None:
    nets = [model(seed) for seed in (1, 2)]
    both = descend_together([descent(net, seed, STEPS + seed) for seed, net in enumerate(nets)])
    for seed, (net, losses) in enumerate(zip(nets, both, strict=True)):
        alone = model(seed + 1)

        def loss(chance: torch.Generator, alone: nn.Module = alone) -> torch.Tensor:
            x, y = draw(chance)
            return (alone(x) - y).square().mean()

        assert losses == pytest.approx(descend(alone, loss, steps=STEPS + seed, rate=RATE, seed=seed))
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters(), strict=True))


def test_one_that_goes_on_does_what_the_other_would_have_done() -> None:
    whole, first, second = (descent(model(1), 3) for _ in range(3))
    due = descend_together([whole])[0]
    for _ in range(STEPS // 2):
        first.step()
    held = first.tensors()
    first.step()  # what was given stays as it was
    second.go_on(held)
    assert second.done == STEPS // 2
    assert descend_together([second])[0] == due
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_what_cannot_go_on_is_refused() -> None:
    one = descent(model(0), 0, 1)
    one.step()
    with pytest.raises(TrainingError, match="all 1 steps are done"):
        one.step()
    with pytest.raises(TrainingError, match="1 steps are done here"):
        one.go_on(one.tensors())
    with pytest.raises(TrainingError, match="another model"):
        descent(nn.Sequential(nn.Linear(3, 1)), 0).go_on(one.tensors())
    net = model(0)
    lost = Descent(net, draw, lambda x, y: net(x).mean() * torch.inf, steps=2, rate=RATE, seed=0)
    with pytest.raises(TrainingError, match="step 1 of 2"):
        descend_together([lost])
