"""Training a small model from nothing, the same way wherever evidence needs one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vestige.errors import TrainingError

__all__ = ["Descent", "descend", "descend_together"]

DECAY, CLIP, WARMUP = 0.1, 1.0, 0.1  # of AdamW; of the gradient's norm; share of the steps
EAGER = 3  # steps before the capture: kernels are chosen, and the optimiser's tensors made


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
    optimiser = _optimiser(model, lr=rate)
    seen = []
    with torch.enable_grad():
        chance = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * _share(step, steps)
            found = loss(chance)
            seen.append(found.item())
            _check(seen[-1], step, steps)
            optimiser.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            after(step + 1)
    return seen


class Descent:
    """The same training, a step at a time and without waiting for it, so that several models can take turns.

    On CUDA a step is captured as a graph after a few, and replayed from then on: a small model is trained many times as
    fast, as its kernels no longer wait for Python. Where a step cannot be captured, steps run as before.

    Args:
        model: what is trained, in place; it draws no random numbers.
        draw: the tensors of one step, of the same shapes in every step, from random numbers on the model's device.
        loss: of those tensors.
        steps, rate, seed: as :func:`descend` has them.
        capture: whether to try.

    Attributes:
        done: steps that were begun.
        captured: whether steps are replayed.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[torch.Generator], Sequence[Tensor]],
        loss: Callable[..., Tensor],
        *,
        steps: int,
        rate: float,
        seed: int,
        capture: bool = True,
    ) -> None:
        self.model, self.draw, self.loss, self.steps, self.largest = model, draw, loss, steps, rate
        self.device = next(model.parameters()).device
        on_cuda = self.device.type == "cuda"
        fast: dict[str, Any] = {"lr": torch.zeros((), device=self.device), "fused": True, "capturable": True}
        self.optimiser = _optimiser(model, **(fast if on_cuda else {}))
        self.stream = torch.cuda.Stream(self.device) if on_cuda else None
        self.chance = torch.Generator(self.device).manual_seed(seed)
        self.seen = torch.full((steps,), torch.nan, device=self.device)
        self.wanted, self.captured, self.done = capture and on_cuda, False, 0
        if on_cuda:
            torch.cuda.synchronize(self.device)  # what was made so far, on another stream

    def step(self) -> None:
        """Begin one more step.

        Raises:
            TrainingError: all are done.
        """
        if self.done == self.steps:
            raise TrainingError(f"all {self.steps} steps are done")
        with torch.cuda.stream(self.stream), torch.enable_grad():  # no stream: a context that does nothing
            self._set_rate(self.largest * _share(self.done, self.steps))
            drawn = self.draw(self.chance)
            if self.wanted and not self.captured and self.done == EAGER:
                self._capture(drawn)
            if self.captured:
                for held, new in zip(self.inputs, drawn, strict=True):
                    held.copy_(new)
                self.graph.replay()
                self.seen[self.done].copy_(self.found)
            else:
                self.seen[self.done].copy_(self._work(*drawn))
        self.done += 1

    def losses(self) -> list[float]:
        """The loss of each step that is done, waited for.

        Raises:
            TrainingError: one is no finite number.
        """
        if self.stream is not None:
            self.stream.synchronize()
        seen: list[float] = self.seen[: self.done].tolist()
        for step, found in enumerate(seen):
            _check(found, step, self.steps)
        return seen

    def _set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # the one that the graph reads
            else:
                group["lr"] = rate

    def _work(self, *drawn: Tensor) -> Tensor:
        found = self.loss(*drawn)
        self.optimiser.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        return found.detach()

    def _capture(self, drawn: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_like(tensor, device=self.device).copy_(tensor) for tensor in drawn]
        self.graph = torch.cuda.CUDAGraph()
        self.optimiser.zero_grad()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self._work(*self.inputs)
            self.captured = True
        except RuntimeError:  # a step that waits for a number, or copies from the host
            self.wanted = False
            self.optimiser.zero_grad()
            torch.cuda.synchronize(self.device)


def descend_together(descents: Sequence[Descent]) -> list[list[float]]:
    """Let all take turns until each has done its steps; on one GPU they run beside each other.

    Returns:
        The losses of each.

    Raises:
        TrainingError: a loss is no finite number.
    """
    while left := [one for one in descents if one.done < one.steps]:
        for one in left:
            one.step()
    return [one.losses() for one in descents]


def _optimiser(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    maps = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": maps, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), **options)


def _share(step: int, steps: int) -> float:
    """Of the largest step size."""
    warmup = max(1, round(WARMUP * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _check(found: float, step: int, steps: int) -> None:
    if not math.isfinite(found):
        raise TrainingError(f"the loss is {found} in step {step + 1} of {steps}")
