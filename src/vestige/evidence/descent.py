"""Training a small model from nothing, the same way wherever evidence needs one."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vestige.errors import TrainingError

__all__ = ["Descent", "descend", "descend_together"]

DECAY, CLIP, WARMUP = 0.1, 1.0, 0.1  # of AdamW; of the gradient's norm; share of the steps
EAGER = 2  # steps of a shape before its capture: kernels are chosen, and the optimiser's tensors made

Shapes = tuple[tuple[int, ...], ...]


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

    On CUDA a step is captured as a graph after a few, one for each shape of what is drawn, and replayed from then on;
    kernels of small models then no longer wait for Python. Where a step cannot be captured, steps run as before.

    Args:
        model: what is trained, in place; it draws no random numbers.
        draw: the tensors of one step, from random numbers on the model's device; of few different shapes.
        loss: of those tensors.
        steps, rate, seed: as :func:`descend` has them.
        capture: whether to try.

    Attributes:
        done: steps that were begun.
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
        self.wanted, self.done = capture and on_cuda, 0
        self.met: Counter[Shapes] = Counter()
        self.replays: dict[Shapes, _Replay] = {}
        if on_cuda:
            torch.cuda.synchronize(self.device)  # what was made so far, on another stream

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return bool(self.replays)

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
            shapes = tuple(tuple(tensor.shape) for tensor in drawn)
            if self.wanted and shapes not in self.replays and self.met[shapes] == EAGER:
                self._capture(shapes, drawn)
            replay = self.replays.get(shapes)
            self.seen[self.done].copy_(self._work(*drawn) if replay is None else replay(drawn))
        self.met[shapes] += 1
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

    def tensors(self) -> dict[str, Tensor]:
        """All that the steps to come depend on, copied to the CPU; what :meth:`go_on` takes."""
        if self.stream is not None:
            self.stream.synchronize()
        held = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, found in self.optimiser.state_dict()["state"].items():
            held |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in found.items()}
        held |= {"chance": self.chance.get_state(), "seen": self.seen[: self.done]}
        return {name: tensor.detach().cpu().clone() for name, tensor in held.items()}

    def go_on(self, held: Mapping[str, Tensor]) -> None:
        """Go on where another of the same model, data and steps was when it gave its :meth:`tensors`.

        Raises:
            TrainingError: steps were begun here already, or what is given is of another model.
        """
        if self.done:
            raise TrainingError(f"{self.done} steps are done here; only one that has not begun can go on for another")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimiser": {}}
        for name, tensor in held.items():
            whose, _, rest = name.partition(".")
            if rest:
                parts[whose][rest] = tensor
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in parts["optimiser"].items():
            number, _, what = name.partition(".")
            state[int(number)][what] = tensor
        try:
            self.model.load_state_dict(parts["model"])
        except RuntimeError as error:
            raise TrainingError(f"what is given is of another model: {error}") from None
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": dict(state)})
        self.chance.set_state(held["chance"])
        self.done = len(held["seen"])
        self.seen[: self.done] = held["seen"].to(self.device)
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # the one that the graphs read
            else:
                group["lr"] = rate

    def _work(self, *drawn: Tensor) -> Tensor:
        found = self.loss(*drawn)
        self.optimiser.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        return found.detach()

    def _capture(self, shapes: Shapes, drawn: Sequence[Tensor]) -> None:
        inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in drawn]
        graph = torch.cuda.CUDAGraph()
        self.optimiser.zero_grad()
        # Steps of one model never overlap, so that its graphs may share their memory.
        pool = next((replay.graph.pool() for replay in self.replays.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                found = self._work(*inputs)
            self.replays[shapes] = _Replay(graph, inputs, found)
        except RuntimeError:  # a step that waits for a number, or copies from the host
            self.wanted = False
            self.optimiser.zero_grad()
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class _Replay:
    """A captured step; called with the tensors of another one, it gives its loss."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    found: Tensor

    def __call__(self, drawn: Sequence[Tensor]) -> Tensor:
        for held, new in zip(self.inputs, drawn, strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.found


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
