"""Claims about a vision transformer's heads: the ones that pruning calls important are; kinds of patterns are found."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vestige.evidence.certify.evidence_vision import VisionCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.data.digits import digits, small_vit
from vestige.evidence.probes import patch_attention
from vestige.evidence.probes.attention_patterns import find_patterns

STEPS, ROWS, RATE = 150, 64, 3e-3
PRUNED = 3  # heads of twelve
GRID = 5


@functools.lru_cache(maxsize=8)
def _trained(seed: int) -> tuple[Any, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A ViT of three layers that reads digits in patches of 2 x 2; images to measure on, and others to prune on."""
    learnt, asked = digits(seed, 700, 800)
    model = small_vit(seed, patch_size=2, num_hidden_layers=3, initializer_range=0.15)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    chance = torch.Generator().manual_seed(seed)
    images, labels = learnt.tensors
    for _ in range(STEPS):
        rows = torch.randint(len(images), (ROWS,), generator=chance)
        optimiser.zero_grad()
        F.cross_entropy(model(images[rows]).logits, labels[rows]).backward()
        optimiser.step()
    pixels, right = asked.tensors
    return model.eval(), (pixels[:400], right[:400]), (pixels[400:], right[400:])


@claim(slow=True)
def important_heads_cost_more_accuracy(case: VisionCase) -> Seen:
    """On images not measured on, pruning the most important heads costs more than pruning random or the least ones."""
    lost: dict[str, list[float]] = {"most": [], "random": [], "least": []}
    for seed in case.seeds:
        model, measured, others = _trained(seed)
        found = case.method.replace(batch=200).measure(model, *measured)
        table = case.method.replace(batch=200).pruning_curve(model, *others, found.ranking(), pruned=(PRUNED,), draws=5)
        mean = table.groupby("kind")["accuracy"].mean()
        expect(mean["none"] > 0.8, f"the model itself answers only {mean['none']:.0%}")
        for kind, losses in lost.items():
            losses.append(float(mean["none"] - mean[kind]))
    told = {kind: ", ".join(f"{value:.3f}" for value in losses) for kind, losses in lost.items()}
    for most, chance, least in zip(*lost.values(), strict=True):
        expect(most > 1.3 * chance and most > least + 0.05, f"accuracy lost: {told}")
        expect(chance > least, f"random heads cost less than the least important: {told}")
    return {f"accuracy lost, {kind}": text for kind, text in told.items()}


@claim
def planted_patterns_are_told_apart(case: VisionCase) -> Seen:
    """Noisy maps of six kinds, from each patch to itself to everywhere, are sorted and named."""
    agreed = []
    for seed in case.seeds:
        attention, kinds = _planted(seed)
        offsets, landings = (
            of(torch.from_numpy(attention), GRID, GRID)
            for of in (patch_attention.offset_map, patch_attention.landing_map)
        )
        how = {"kinds": len(NAMES), "code": case.method.code, "steps": case.method.steps}
        found = find_patterns(offsets, landings, **how, seed=seed)
        names = np.array(found.names)[found.kinds]
        agreed.append(float((names == np.array(NAMES)[kinds]).mean()))
    expect(min(agreed) >= 0.95, f"share of the maps that got their own name: {agreed}")
    return {"named rightly": min(agreed), "by chance": 1 / len(NAMES)}


NAMES = ("itself", "next patch", "own row", "own column", "fixed places", "everywhere")


def _planted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention maps ``(maps, patches, patches)`` of each kind in :data:`NAMES`, blurred and noisy, and their kinds."""
    chance = np.random.default_rng(seed)
    place = np.arange(GRID * GRID)
    down, across = place // GRID, place % GRID
    same_row, same_column = down[:, None] == down, across[:, None] == across
    plain = {
        "itself": np.eye(GRID * GRID),
        "next patch": same_row & (across[None] - across[:, None] == 1),
        "own row": same_row,
        "own column": same_column,
        "fixed places": np.isin(place, (3, 17))[None].repeat(GRID * GRID, 0),
        "everywhere": np.ones((GRID * GRID, GRID * GRID)),
    }
    maps, kinds = [], []
    for kind, name in enumerate(NAMES):
        for _ in range(40):
            noise = chance.dirichlet(np.full(GRID * GRID, 1.0), GRID * GRID)
            base = plain[name] / np.maximum(plain[name].sum(axis=1, keepdims=True), 1)
            mixed = 0.8 * base + 0.2 * noise
            maps.append(mixed / mixed.sum(axis=1, keepdims=True))
            kinds.append(kind)
    return np.stack(maps), np.array(kinds)
