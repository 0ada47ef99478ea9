"""Training a small model from nothing, the same way wherever evidence needs one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vestige.errors import TrainingError

__all__ = ["descend"]

DECAY, CLIP, WARMUP = 0.1, 1.0, 0.1  # of AdamW; of the gradient's norm; share of the steps


def descend(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    rate: float,
    seed: int,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train with AdamW: warm-up, cosine.

    Args:
        model: what is trained, in place.
        loss: of one step, on data drawn from random numbers that are the same for the same seed.
        steps: how many.
        rate: the largest step size.
        seed: of the random numbers.
        after: called after each step with the number of steps done.

    Returns:
        The loss of each step.

    Raises:
        TrainingError: a loss is no finite number.
    """
    maps = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": maps, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, round(WARMUP * steps))
    seen = []
    with torch.enable_grad():
        chance = torch.Generator().manual_seed(seed)
        for step in range(steps):
            share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            found = loss(chance)
            seen.append(found.item())
            if not math.isfinite(seen[-1]):
                raise TrainingError(f"the loss is {seen[-1]} in step {step + 1} of {steps}")
            optimiser.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            after(step + 1)
    return seen
