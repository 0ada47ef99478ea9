"""RegLoRA of SEFE (arXiv 2505.02486): W + s B A for every linear map of a block; W, once an experience is learnt.

    R_t = places of the largest M |B A| of experience t, per map
    L   = CE + lambda mean over maps of mean over (i, j) in R_1, R_2, ... of |(B A)_ij|

A is even within 1 / sqrt(inputs), drawn anew for each experience, map by map, block by block; B starts at zero. The
output layer is trained too, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["SMALL", "learn"]

SMALL = {"weight": 20.0, "share": 0.1}
SEED = 42
"""The seed that training has where none is given."""
PARTS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    rank: int,
    scale: float,
    share: float,
    weight: float,
    freeze_head: bool,
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    blocks = sorted({name.split(".")[2] for name in weights if name.startswith("vit.layers.")})
    maps = [f"vit.layers.{block}.{part}.weight" for block in blocks for part in PARTS]
    draw = torch.Generator().manual_seed(SEED)
    noted: dict[str, list[int]] = {name: [] for name in maps}
    for e in experiences:
        learnt = {name: w for name, w in weights.items() if name.startswith("classifier.") and not freeze_head}
        for name in maps:
            outputs, inputs = weights[name].shape
            even = 2 * torch.rand(rank, inputs, generator=draw, dtype=torch.float64) - 1
            learnt[f"A {name}"] = even / math.sqrt(inputs)
            learnt[f"B {name}"] = torch.zeros(outputs, rank, dtype=torch.float64)

        def whole(v: Weights, weights: Weights = weights) -> Weights:
            own = {name: value for name, value in v.items() if name in weights}
            sums = {name: weights[name] + scale * v[f"B {name}"] @ v[f"A {name}"] for name in maps}
            return {**weights, **own, **sums}

        def loss(v: Weights, e: Experience = e) -> Tensor:
            value = cross_entropy(net.logits(whole(v), e.x), e.y)
            if not noted[maps[0]]:
                return value
            held = [(v[f"B {n}"] @ v[f"A {n}"]).flatten()[noted[n]].abs().mean() for n in maps]
            return value + weight * torch.stack(held).mean()

        for _ in range(epochs):
            learnt = descend(loss, learnt, lr)
        for name in maps:
            change = (learnt[f"B {name}"] @ learnt[f"A {name}"]).abs().flatten()
            order = change.argsort(descending=True)
            noted[name] += order[: max(1, round(share * len(change)))].tolist()
        weights = {name: w.detach() for name, w in whole(learnt).items()}
    return weights
