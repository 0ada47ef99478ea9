"""Teaching converted layers what the attention did whose place they took.

Two stages, as Lizard has them. First every layer on its own: it is given what the attention was given, in the
original model, and learns to give what that gave; only weights that attention does not have are trained. Then the
whole model predicts text, and the projections of the converted layers learn too, through adapters of low rank that
are merged at the end, or in full. Nothing but weights of converted layers is ever changed, so the conversion can be
undone as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vestige.core.packages import need
from vestige.errors import InputError, SpecError, TrainingError
from vestige.models.convert import PROJECTIONS, Conversion, ConvertedAttention

__all__ = ["Distilled", "distill"]

BETAS, EPS, CLIP, WARMUP, FLOOR = (0.9, 0.99), 1e-8, 1.0, 0.1, 0.1
"""Of AdamW; of the gradient's norm; share of the steps; share of the rate that is left at the end (the paper's)."""

Tell = Callable[[str, int, int, float], None]
"""Takes the stage, the step, the steps in all and the loss."""


@dataclass(frozen=True)
class Distilled:
    """How the losses went.

    Attributes:
        match: of the first stage, per step: the share of the attention's output (mean square) that is not matched,
            mean over layers.
        tune: of the second stage, per step: cross entropy in nats per token.
        unmatched: per converted layer, that share in the first stage's last step.
    """

    match: tuple[float, ...]
    tune: tuple[float, ...]
    unmatched: dict[int, float]


def distill(
    conversion: Conversion,
    ids: Int[Tensor, "rows length"],
    *,
    match_steps: int = 200,
    tune_steps: int = 200,
    match_rate: float = 1e-3,
    tune_rate: float = 5e-4,
    tune: Literal["lora", "full"] = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    batch: int = 8,
    seed: int = 0,
    tell: Tell | None = None,
) -> Distilled:
    """Train the layers of a conversion in two stages.

    Args:
        conversion: what :func:`vestige.models.convert.convert` gave.
        ids: blocks of text, each read from its beginning; they come in a random order, again and again.
        match_steps: of the first stage, in which layers learn what attention gave; 0: none.
        tune_steps: of the second stage, in which the model learns to predict; 0: none.
        match_rate, tune_rate: the highest learning rates; warm-up and cosine around them.
        tune: what learns in the second stage beside the weights that attention lacks: adapters of the projections of
            queries, keys and values (which needs peft), or all weights of the converted layers.
        rank, alpha: of the adapters.
        batch: blocks per step.
        seed: of the order of blocks, and of the adapters.
        tell: called after each step.

    Returns:
        The losses. The model is left in the mode that it was in, and what could be trained before can be again.

    Raises:
        SpecError: a number out of range.
        InputError: no blocks; or the conversion has been undone.
        MissingPackageError: adapters are wanted and peft is absent.
        TrainingError: a loss is no number.
    """
    _check(conversion, ids, match_steps, tune_steps, match_rate, tune_rate, tune, rank, batch)
    ids = ids.to(next(conversion.model.parameters()).device)
    with _training_only(conversion), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match, unmatched = _match(conversion, _batches(ids, batch, match_steps, seed), match_steps, match_rate, tell)
        rows = _batches(ids, batch, tune_steps, seed + 1)
        losses = _tune(conversion, rows, tune_steps, tune_rate, tune, rank, alpha, tell)
    return Distilled(tuple(match), tuple(losses), unmatched)


def _match(
    conversion: Conversion, rows: Iterator[Tensor], steps: int, rate: float, tell: Tell | None
) -> tuple[list[float], dict[int, float]]:
    """Layers learn what attention gave; each is given what came to it in the original model."""
    weights = [weight for part in conversion.modules for weight in part.fresh()]
    losses: list[float] = []
    seen: dict[int, Tensor] = {}  # read when a pass is over, so that no layer waits for the one before
    if not steps or not weights:
        return losses, {}

    def compare(part: ConvertedAttention, x: Tensor, given: dict[str, Any]) -> Any:
        due = part.original(x, **given)
        with torch.enable_grad():
            missed = (part.mix(x, given) - due[0]).float().square().mean() / due[0].float().square().mean()
            missed.backward()
        seen[part.layer_idx] = missed.detach()
        return due

    with _learning(weights, steps, rate) as step:
        conversion.current.watch = compare
        try:
            for number, block in enumerate(rows, 1):
                with torch.no_grad():
                    _base(conversion.model)(block, use_cache=False)
                losses.append(float(torch.stack(list(seen.values())).mean()))
                step(losses[-1])
                if tell:
                    tell("match", number, steps, losses[-1])
        finally:
            conversion.current.watch = None
    return losses, {layer: float(missed) for layer, missed in seen.items()}


def _tune(
    conversion: Conversion,
    rows: Iterator[Tensor],
    steps: int,
    rate: float,
    how: str,
    rank: int,
    alpha: float,
    tell: Tell | None,
) -> list[float]:
    """The model learns to predict."""
    losses: list[float] = []
    if not steps:
        return losses
    fresh = [weight for part in conversion.modules for weight in part.fresh()]
    with _adapters(conversion, rank, alpha) if how == "lora" else _all_weights(conversion) as others:
        known = {id(weight) for weight in others}
        weights = others + [weight for weight in fresh if id(weight) not in known]
        with _learning(weights, steps, rate) as step:
            for number, block in enumerate(rows, 1):
                loss = conversion.model(input_ids=block, labels=block, use_cache=False).loss
                loss.backward()
                losses.append(loss.item())
                step(losses[-1])
                if tell:
                    tell("tune", number, steps, losses[-1])
    return losses


@contextmanager
def _learning(weights: Sequence[nn.Parameter], steps: int, rate: float) -> Iterator[Callable[[float], None]]:
    """What is called with the loss after each backward pass, while some weights can be trained.

    Weights in half precision learn through copies in float32: a step is often less than what they can tell apart.
    """
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    masters = [weight if weight.dtype.itemsize > 2 else weight.detach().float() for weight in weights]
    copied = [(master, weight) for master, weight in zip(masters, weights, strict=True) if master is not weight]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=round(WARMUP * steps), num_training_steps=steps, min_lr_rate=FLOOR
    )

    def step(loss: float) -> None:
        if loss != loss or loss in (float("inf"), -float("inf")):
            raise TrainingError(f"the loss is {loss}; the weights are those of the step before. Try a lower rate")
        for master, weight in copied:
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, weight in copied:
                weight.copy_(master)

    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield step
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def _adapters(conversion: Conversion, rank: int, alpha: float) -> Iterator[list[nn.Parameter]]:
    """Adapters of low rank on the projections of queries, keys and values; merged at the end, whatever happens."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = [name for name in PROJECTIONS if name != "o_proj"]
    plan = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)  # type: ignore[arg-type]
    layers = nn.ModuleList(part.layer for part in conversion.modules)
    inject_adapter_in_model(plan, layers)
    try:
        yield [weight for name, weight in layers.named_parameters() if "lora_" in name]
    finally:
        for layer, name in itertools.product(layers, targets):
            adapted = getattr(layer, name)
            if isinstance(adapted, LoraLayer):
                adapted.merge()  # type: ignore[operator]
                setattr(layer, name, adapted.get_base_layer())


@contextmanager
def _all_weights(conversion: Conversion) -> Iterator[list[nn.Parameter]]:
    """All weights of the converted layers."""
    yield [weight for part in conversion.modules for weight in part.layer.parameters()]


@contextmanager
def _training_only(conversion: Conversion) -> Iterator[None]:
    """Nothing can be trained and nothing is dropped, until the end; then all is as it was."""
    model = conversion.model
    modes = {part: part.training for part in model.modules()}
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    originals = [(w, w.requires_grad) for part in conversion.modules for w in part.original.parameters()]
    for weight, _ in originals:
        weight.requires_grad_(False)
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
        for weight, before in originals:
            weight.requires_grad_(before)
        for part, mode in modes.items():
            part.training = mode


def _batches(ids: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Blocks in a random order, and again in another one when all have been."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(ids), generator=generator).tolist()
        yield ids[order[:batch]]
        order = order[batch:]


def _base(model: nn.Module) -> nn.Module:
    """The model without its head."""
    from vestige.core.anatomy import Anatomy

    return Anatomy.of(model).base


def _check(
    conversion: Conversion,
    ids: Tensor,
    match_steps: int,
    tune_steps: int,
    match_rate: float,
    tune_rate: float,
    tune: str,
    rank: int,
    batch: int,
) -> None:
    counts = {"match_steps": (match_steps, 0), "tune_steps": (tune_steps, 0), "rank": (rank, 1), "batch": (batch, 1)}
    for name, (value, least) in counts.items():
        if type(value) is not int or value < least:
            raise SpecError(f"{name} is {value!r}; allowed: int >= {least}")
    for name, rate in {"match_rate": match_rate, "tune_rate": tune_rate}.items():
        if not rate > 0:
            raise SpecError(f"{name} is {rate!r}; allowed: > 0")
    if tune not in ("lora", "full"):
        raise SpecError(f"tune is {tune!r}; allowed: lora, full")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype.is_floating_point or ids.shape[0] < 1:
        raise InputError("ids must be whole numbers, (rows, length), with one row at least")
    if ids.shape[1] < 2:
        raise InputError(f"blocks of {ids.shape[1]} tokens hold nothing to predict; two are the least")
    if not all(any(part is here for here in conversion.model.modules()) for part in conversion.modules):
        raise InputError("the conversion has been undone; convert the model anew")
    if tune == "lora" and tune_steps:
        need("tuning through adapters", "weights", "peft")
