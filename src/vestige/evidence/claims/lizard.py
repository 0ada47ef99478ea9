"""Claims of Lizard: what attention reached beyond the window is not lost when its layers are converted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.layers.mixers.attention import AttentionMixer
from vestige.layers.mixers.lizard import Lizard
from vestige.layers.mixers.sliding_window import SlidingWindow
from vestige.models.convert import convert
from vestige.models.distill import distill
from vestige.models.tiny import tiny_model

WINDOW, GAP, TIMES = 4, 7, 4  # two layers with such a window do not reach over the gap
VALUES, NOISE, QUESTION = 8, 5, 6
STEPS, TAUGHT, RATE, ROWS = 120, 60, 3e-3, 32


@claim(slow=True)
def what_attention_reached_is_reached_again(case: LayerCase) -> Seen:
    """A model that answers from beyond the window still does after both stages; with the window alone, and all its
    weights tuned as long, it does not. What the attention gave is matched better than it was to begin with."""
    seen: dict[str, list[Any]] = {"before": [], "lizard": [], "window alone": [], "unmatched, first and last": []}
    for seed in case.seeds:
        teacher = _teacher(seed, case.device)
        seen["before"].append(_right(teacher, case.device))
        for name, mixer in (
            ("lizard", Lizard(window=WINDOW, features=16)),
            ("window alone", SlidingWindow(window=WINDOW)),
        ):
            right, losses = _converted(teacher, mixer, seed, case.device)
            seen[name].append(right)
            if losses:
                seen["unmatched, first and last"].append((losses[0], losses[-1]))
    expect(min(seen["before"]) > 0.9, f"there was nothing to lose: {seen}")
    expect(min(seen["lizard"]) > max(seen["window alone"]) + 0.3, f"a window alone does nearly as well: {seen}")
    expect(all(last < 0.7 * first for first, last in seen["unmatched, first and last"]), f"nothing is matched: {seen}")
    return seen


def _text(rows: int, generator: torch.Generator) -> Tensor:
    """A value, and after each stretch of noise the question for it and the answer."""
    value = torch.randint(10, 10 + VALUES, (rows, 1), generator=generator)
    noise, question = torch.full((rows, GAP - 1), NOISE), torch.full((rows, 1), QUESTION)
    return torch.cat([value, *[torch.cat([noise, question, value], 1)] * TIMES], 1)


def _teacher(seed: int, device: str) -> Any:
    """A small model that has learnt to answer."""
    model = copy.deepcopy(tiny_model("llama", torch.float32, device, seed))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        text = _text(ROWS, generator).to(device)
        model(input_ids=text, labels=text, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _converted(teacher: Any, mixer: AttentionMixer, seed: int, device: str) -> tuple[float, tuple[float, ...]]:
    """The share of right answers after conversion and both stages, and the losses of the first."""
    model = copy.deepcopy(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swap = convert(model, mixer)
    text = _text(512, torch.Generator().manual_seed(seed + 1))
    learnt = distill(
        swap,
        text,
        match_steps=TAUGHT,
        tune_steps=TAUGHT,
        match_rate=1e-2,
        tune_rate=RATE,
        tune="full",
        batch=ROWS,
        seed=seed,
    )
    return _right(model, device), learnt.match


@torch.no_grad()
def _right(model: Any, device: str) -> float:
    """The share of right answers."""
    text = _text(256, torch.Generator().manual_seed(999)).to(device)
    asked = text[:, :-1] == QUESTION
    told = model(input_ids=text, use_cache=False).logits[:, :-1].argmax(-1)
    return (told == text[:, 1:])[asked].float().mean().item()
