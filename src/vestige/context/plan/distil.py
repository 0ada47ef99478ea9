"""Learning the gates of DuoAttention: which heads a model needs whole, by what its answers lose without them."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vestige.context.plan.passkeys import Sample, check_samples, pass_keys
from vestige.context.plan.windows import fingerprint, save_plan, table
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.layers.ops.attention_mass import capped

if TYPE_CHECKING:
    from vestige.context.plan.duo_attention import DuoAttention

__all__ = ["GatedAttention", "hold_still", "learn_gates"]

logger = logging.getLogger(__name__)

EVERY = 10  # steps from one checkpoint, and one line of the log, to the next
TIE = 1e-3  # weight of the mean of a gate's course in what is returned: it orders gates that end level


def learn_gates(
    method: DuoAttention,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    samples: Sequence[Sample] | None = None,
    lengths: Sequence[int] | None = None,
    steps: int = 400,
    learning_rate: float = 0.02,
    weight: float = 0.05,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DuoAttention:
    r"""Learn a gate for each key-value head by distillation; the model itself stays as it is.

    Each step reads one text twice: as the model is, and with gated attention. With :math:`H` the hidden states (after
    the last norm) at the tokens that answer, the loss is

    .. math:: \|H_{gated} - H\|^2 / \|H\|^2 + weight \cdot \text{mean of the gates},

    minimised by AdamW over the gates alone, which begin at 1 and are kept between 0 and 1. (The paper does not divide;
    its weight of 0.05 is for hidden states of a certain size. Its code takes the full attention in the gated pass from
    the other pass; here, as in its equation, both parts come from the same queries, keys and values.)

    ``steps`` times ``learning_rate`` must be well above 1, or no gate can reach 0. One text's activations are held.

    Args:
        method: what to learn gates for; its ``sinks`` and ``recent`` are those of the gated attention.
        tokenizer: of the model, to write texts with pass keys (:func:`~vestige.context.plan.passkeys.pass_keys`).
        samples: texts to learn from instead; they are gone through again and again.
        lengths: tokens of the texts written; by default from twice to ten times what a streaming head holds.
        weight: of the mean of the gates in the loss.
        checkpoint: a file that holds the state of the training; if it is there, training goes on from it.
        progress: called with the number of steps done, and of all.

    Raises:
        SpecError: a parameter out of range.
        InputError: neither tokenizer nor samples, a text too short for the windows to matter or too long for the
            model, or a checkpoint of another training.
        UnsupportedModelError: the model is no causal decoder that Vestige knows.
    """
    anatomy = Anatomy.of(model)
    anatomy.need_causal(method.name)
    for name, value, allowed in (
        ("steps", steps, steps >= 1),
        ("learning_rate", learning_rate, learning_rate > 0),
        ("weight", weight, weight >= 0),
    ):
        if not allowed:
            raise SpecError(f"{method.name}: {name!r} is {value!r}; allowed: more than 0")
    samples = _texts(method, anatomy, tokenizer, samples, lengths, steps, seed)
    device = next(anatomy.base.parameters()).device
    gates = torch.ones(anatomy.num_layers, anatomy.num_kv_heads, device=device, requires_grad=True)
    course = torch.zeros_like(gates, requires_grad=False)
    optimizer = torch.optim.AdamW([gates], lr=learning_rate, weight_decay=0.0)
    settings = {
        "fitted_on": fingerprint(anatomy),
        "sinks": method.sinks,
        "recent": method.recent,
        "steps": steps,
        "learning_rate": learning_rate,
        "weight": weight,
        "seed": seed,
    }
    run = _Training(gates, course, optimizer, settings)
    done = run.resume(Path(checkpoint)) if checkpoint is not None else 0
    attention = GatedAttention(method.sinks, method.recent)
    with Patch(model, f"{method.name} fit", claims={"kv-cache"}) as patch:
        hold_still(patch, anatomy)
        patch.attention("vestige-gated", attention, part=anatomy.base)
        for step in range(done, steps):
            sample = samples[step % len(samples)]
            loss, kept = _losses(anatomy, attention, gates, sample)
            optimizer.zero_grad()
            (gates.grad,) = torch.autograd.grad(loss + weight * kept, gates)
            optimizer.param_groups[0]["lr"] = learning_rate * _rate(step, steps)
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
                course += gates
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                logger.info("step %d of %d: loss %.4f, mean gate %.3f", step + 1, steps, loss.item(), kept.item())
                if checkpoint is not None:
                    run.save(Path(checkpoint), step + 1)
            if progress is not None:
                progress(step + 1, steps)
    found = (1 - TIE) * gates.detach() + TIE * course / steps
    return method.replace(gates=table(found, digits=6), fitted_on=fingerprint(anatomy))


def _texts(
    method: DuoAttention,
    anatomy: Anatomy,
    tokenizer: Any,
    samples: Sequence[Sample] | None,
    lengths: Sequence[int] | None,
    steps: int,
    seed: int,
) -> Sequence[Sample]:
    """What is learnt from: the texts given, or such with pass keys."""
    least = method.sinks + method.recent
    if samples is None:
        if tokenizer is None:
            raise InputError(f"{method.name}: fitting needs a tokenizer to write texts with, or samples")
        lengths = lengths or _lengths(least, anatomy.max_positions)
        if min(lengths) <= least:
            raise InputError(
                f"{method.name}: texts of {min(lengths)} tokens are too short: a streaming head holds sinks + recent = "
                f"{least}, so that no head would lose anything"
            )
        samples = list(itertools.islice(pass_keys(tokenizer, lengths, seed=seed), steps))
    check_samples(samples, anatomy, least, f"every head would hold all of it ({least} tokens)")
    return samples


def _losses(anatomy: Anatomy, attention: GatedAttention, gates: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """How far the answers' hidden states are from the model's own, and the mean of the gates."""
    ids, counts = sample.tensors(gates.device)

    def hidden(with_gates: Tensor | None) -> Tensor:
        attention.gates = with_gates
        states = anatomy.base(input_ids=ids, use_cache=False).last_hidden_state[0, :-1][counts]
        return states.to(torch.promote_types(states.dtype, torch.float32))

    with torch.no_grad():
        own = hidden(None)
    return (hidden(gates) - own).square().mean() / own.square().mean(), gates.mean()


class GatedAttention:
    """Full attention mixed with attention to sinks and recent tokens; full attention alone without gates."""

    def __init__(self, sinks: int, recent: int) -> None:
        self.sinks, self.recent = sinks, recent
        self.gates: Tensor | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        count, group = query.shape[2], query.shape[1] // key.shape[1]
        place = torch.arange(count, device=query.device)
        age = place[:, None] - place
        seen = age >= 0 if sliding_window is None else (age >= 0) & (age < sliding_window)
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        full = _attend(query, key, value, seen, scaling, softcap)
        if self.gates is not None:
            layer: int = module.layer_idx  # type: ignore[assignment]
            gate = self.gates[layer].clamp(0, 1).repeat_interleave(group)[:, None, None].to(query.dtype)
            near = seen & ((age < self.recent) | (place < self.sinks))
            full = gate * full + (1 - gate) * _attend(query, key, value, near, scaling, softcap)
        return full.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    logits = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return torch.softmax(capped(logits, softcap).masked_fill(~mask, float("-inf")), dim=-1) @ value


def hold_still(patch: Patch, anatomy: Anatomy) -> None:
    """Switch dropout off, and keep gradients from being collected for weights."""
    for module in anatomy.base.modules():
        if module.training:
            patch.attribute(module, "training", False)
    for parameter in anatomy.base.parameters():
        if parameter.requires_grad:
            patch.attribute(parameter, "requires_grad", False)


def _rate(step: int, steps: int) -> float:
    """A fifth of the steps to warm up, a fifth to cool down, and never below a tenth."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _lengths(least: int, most: int) -> list[int]:
    """Ten lengths from twice to ten times what a streaming head holds, as far as the model reads."""
    top = min(10 * least, most)
    return [round(2 * least + part * (top - 2 * least) / 9) for part in range(10)] if top > 2 * least else [top]


class _Training:
    """The state of a training in a file, so that it can be interrupted."""

    def __init__(self, gates: Tensor, course: Tensor, optimizer: Any, settings: dict[str, Any]) -> None:
        self.gates, self.course, self.optimizer, self.settings = gates, course, optimizer, settings

    def save(self, path: Path, step: int) -> None:
        from safetensors.torch import save

        moments = self.optimizer.state[self.gates]
        tensors = {"gates": self.gates.detach(), "course": self.course}
        tensors |= {name: moments[name] for name in ("exp_avg", "exp_avg_sq")}
        state = json.dumps({**self.settings, "step": step})
        save_plan(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata={"training": state}))

    def resume(self, path: Path) -> int:
        """Steps done before, whose state is taken over; 0 where there is no file."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return 0
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                state = json.loads((file.metadata() or {}).get("training", "{}"))
                tensors = {name: file.get_tensor(name).to(self.gates.device) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{os.fspath(path)!r} cannot be read as a checkpoint: {error}") from None
        step = state.pop("step", None)
        if step is None or state != self.settings:
            raise InputError(f"{os.fspath(path)!r} is the checkpoint of another training: {state}, not {self.settings}")
        with torch.no_grad():
            self.gates.copy_(tensors["gates"])
            self.course.copy_(tensors["course"])
        self.optimizer.state[self.gates] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors["exp_avg"],
            "exp_avg_sq": tensors["exp_avg_sq"],
        }
        return step
