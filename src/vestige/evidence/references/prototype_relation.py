"""Prototype-sample relation distillation (arXiv 2303.14771). f are features, z = g(f) / |g(f)| their projections.

    L_SC  mean_i mean_{p: y_p = y_i, p != i} -log( exp(z_i z_p / T) / sum_{j != i} exp(z_i z_j / T) )
    L_p   mean_i 1 - cos(f_i, w_{y_i}), which moves the prototypes w and not the features
    L_d   mean over old classes c of KL(softmax_i(f'_i w'_c / |w'_c| s) || softmax_i(f_i w_c / |w_c| s)),
          f' and w' of the model before the experience
    L     = L_SC + a L_p + b L_d

or, over prototypes, the softmax runs over the old classes c of one experience, with the mean over rows i and the sum
over experiences. Prototypes are the rows of the output layer, short at first and of length 1 in the end; its bias is 0.
g is linear, ReLU, linear, even within 1 / sqrt(inputs) at first. A second view of each row, here the same again,
doubles the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, descend

__all__ = ["learn"]

SEED = 42
"""The seed that training has where none is given."""
PROTOTYPES, BIAS = "classifier.weight", "classifier.bias"


def unit(v: Tensor) -> Tensor:
    """v / |v|, row by row."""
    return v / v.norm(dim=-1, keepdim=True)


def contrast(z: Tensor, y: Tensor, T: float) -> Tensor:
    """L_SC."""
    values = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positive = [j for j in others if y[j] == y[i]]
        if positive:
            total = torch.stack([(z[i] @ z[j] / T).exp() for j in others]).sum()
            values.append(torch.stack([-(z[i] @ z[p] / T) + total.log() for p in positive]).mean())
    return torch.stack(values).mean() if values else z.sum() * 0


def divergence(q: Tensor, p: Tensor, dim: int) -> Tensor:
    """KL(softmax q || softmax p), summed."""
    return (q.softmax(dim) * (q.log_softmax(dim) - p.log_softmax(dim))).sum()


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    temperature: float,
    prototypes: float,
    relations: float,
    softness: float,
    length: float,
    over: str,
    projection: int,
    views: int,
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`."""
    zero = torch.zeros_like(weights[BIAS])
    v = {name: w for name, w in weights.items() if name != BIAS}
    v[PROTOTYPES] = length * unit(v[PROTOTYPES])
    dim, draw = v[PROTOTYPES].shape[1], torch.Generator().manual_seed(SEED)
    for name, rows in (("first", dim), ("second", projection)) if projection else ():
        v[name] = (2 * torch.rand(rows, dim, generator=draw, dtype=torch.float64) - 1) / math.sqrt(dim)
        v[f"{name} bias"] = torch.zeros(rows, dtype=torch.float64)

    def features(v: Weights, x: Tensor) -> Tensor:
        return net.features({**{name: v[name] for name in weights if name != BIAS}, BIAS: zero}, x)

    def projected(v: Weights, f: Tensor) -> Tensor:
        if not projection:
            return f
        return (f @ v["first"].T + v["first bias"]).clamp(min=0) @ v["second"].T + v["second bias"]

    for n, e in enumerate(experiences):
        old, star = [each.classes for each in experiences[:n]], dict(v)
        x, y = torch.cat([e.x] * views), torch.cat([e.y] * views)

        def loss(v: Weights, x: Tensor = x, y: Tensor = y, old: list[list[int]] = old, star: Weights = star) -> Tensor:
            f = features(v, x)
            value = contrast(unit(projected(v, f)), y, temperature)
            value = value + prototypes * (1 - (unit(f.detach()) * unit(v[PROTOTYPES])[y]).sum(1)).mean()
            if not old:
                return value
            now = f @ unit(v[PROTOTYPES]).T / softness
            then = features(star, x).detach() @ unit(star[PROTOTYPES]).T / softness
            if over == "samples":
                known = [c for classes in old for c in classes]
                gap = divergence(then[:, known], now[:, known], 0) / len(known)
            else:
                gap = torch.stack([divergence(then[:, c], now[:, c], 1) / len(x) for c in old]).sum()
            return value + relations * gap

        for _ in range(epochs):
            v = descend(loss, v, lr)
    return {**{name: v[name] for name in weights if name != BIAS}, PROTOTYPES: unit(v[PROTOTYPES]), BIAS: zero}
