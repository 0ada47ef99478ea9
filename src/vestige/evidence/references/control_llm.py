"""Control LLM (arXiv 2501.10979): copies V of some blocks learn beside the frozen ones W, and outputs are mixed.

With x what both are given, f = block(x; W) and e = block(x; V), V = W at first, the next block is given

    lerp:      f + a (e - f),     a = sigmoid(c)
    dlerp:     the same with      a = sigmoid(w [f, e] + c)  for each token
    dlerp-in:  the same with      a = sigmoid(w x + c)       for each token
    prog:      P f + a (e - P f), a = sigmoid(c)
    slerp:     (sin((1 - a) t) f + sin(a t) e) / sin t, t the angle between f and e; where that is 0, as lerp
    proj:      as lerp, but the distance below is between P f and e

and each block adds to the loss, mean over rows and tokens, mean over blocks, times the weight of alignment,

    mse:     mean over features of (e - f)^2
    cosine:  smooth L1 of 1 - cos(f, e), which is d^2 / 2 below 1 and d - 1/2 above

with "dynamic" times a. A stacked copy is given f instead, hands on its own output, and begins with zeros in the last
map of attention and of the feed-forward part. w is even within 1 / sqrt(inputs), P the identity with noise of 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["SMALL", "learn"]

SMALL = {"every": 1, "freeze_head": False}
SEED = 42
"""The seed that training has where none is given."""


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def mixed(v: Weights, interpolation: str, x: Tensor, f: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """What the next block is given, and the share a (rows, tokens)."""
    c = v["factor"][0]
    a = torch.full(f.shape[:2], 1.0, dtype=f.dtype) * torch.sigmoid(c)
    if interpolation == "dlerp":
        a = torch.sigmoid(torch.cat([f, e], -1) @ v["weight"] + c)
    if interpolation == "dlerp-in":
        a = torch.sigmoid(x @ v["weight"] + c)
    if interpolation == "prog":
        f = torch.einsum("ij,rtj->rti", v["lateral"], f)
    a1 = a[..., None]
    if interpolation == "slerp":
        cos = ((f * e).sum(-1) / (f.norm(dim=-1) * e.norm(dim=-1)))[..., None]
        same = 1 - cos < 1e-6
        t = torch.acos(torch.where(same, 0.5, cos))
        arc = (torch.sin((1 - a1) * t) * f + torch.sin(a1 * t) * e) / torch.sin(t)
        return torch.where(same, (1 - a1) * f + a1 * e, arc), a
    return (1 - a1) * f + a1 * e, a


def apart(distance: str, f: Tensor, e: Tensor) -> Tensor:
    """The distance of each token's states (rows, tokens)."""
    if distance == "mse":
        return ((e - f) ** 2).mean(-1)
    d = (1 - (f * e).sum(-1) / (f.norm(dim=-1) * e.norm(dim=-1))).clamp(min=0)
    return torch.where(d < 1, d**2 / 2, d - 0.5)


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    every: int,
    layers: str,
    structure: str,
    interpolation: str,
    share: float,
    learn_share: bool,
    distance: str,
    alignment: float,
    balance: str,
    freeze_head: bool,
) -> Weights:
    """The weights, which stay, and what is held beside: copies (``1.block...``), interpolators, and a trained head."""
    assert not layers
    vit = net.module.vit
    draw, width = torch.Generator().manual_seed(SEED), vit.config.hidden_size
    chosen = [i for i in range(len(vit.layers)) if (i + 1) % min(every, len(vit.layers)) == 0]
    stacked = {i for k, i in enumerate(chosen) if structure == "stack" or (structure == "hybrid" and k % 2 == 0)}
    learnt = {f"head.{name}": w for name, w in below(weights, "classifier.").items()}
    fixed: Weights = {}
    if freeze_head:
        fixed, learnt = learnt, {}
    for i in chosen:
        for name, w in below(weights, f"vit.layers.{i}.").items():
            silent = i in stacked and name.startswith(("attention.o_proj.", "mlp.fc2."))
            learnt[f"{i}.block.{name}"] = torch.zeros_like(w) if silent else w.clone()
        if i in stacked:
            continue
        factor = torch.tensor([math.log(share / (1 - share))], dtype=torch.float64)
        (learnt if learn_share else fixed)[f"{i}.interpolator.factor"] = factor
        if interpolation in ("dlerp", "dlerp-in"):
            inputs = width * (2 if interpolation == "dlerp" else 1)
            even = 2 * torch.rand(inputs, generator=draw, dtype=torch.float64) - 1
            learnt[f"{i}.interpolator.weight"] = even / math.sqrt(inputs)
        if interpolation in ("prog", "proj"):
            noise = torch.randn(width, width, generator=draw, dtype=torch.float64)
            learnt[f"{i}.interpolator.lateral"] = torch.eye(width, dtype=torch.float64) + 0.01 * noise

    def loss(v: Weights, e: Experience) -> Tensor:
        v = {**fixed, **v}
        x = functional_call(vit.embeddings, below(weights, "vit.embeddings."), (e.x,))
        gaps = []
        for i, block in enumerate(vit.layers):
            f = functional_call(block, below(weights, f"vit.layers.{i}."), (x,))
            if i not in chosen:
                x = f
            elif i in stacked:
                x = functional_call(block, below(v, f"{i}.block."), (f,))
            else:
                beside = functional_call(block, below(v, f"{i}.block."), (x,))
                merged, a = mixed(below(v, f"{i}.interpolator."), interpolation, x, f, beside)
                if interpolation == "proj":
                    f = torch.einsum("ij,rtj->rti", v[f"{i}.interpolator.lateral"], f)
                gaps.append((apart(distance, f, beside) * (a if balance == "dynamic" else 1)).mean())
                x = merged
        states = functional_call(vit.layernorm, below(weights, "vit.layernorm."), (x,))[:, 0]
        value = cross_entropy(states @ v["head.weight"].T + v["head.bias"], e.y)
        return value + alignment * sum(gaps) / len(gaps) if gaps else value

    for e in experiences:
        for _ in range(epochs):
            learnt = descend(lambda v, e=e: loss(v, e), learnt, lr)  # type: ignore[misc]
    # Factors that are not trained are held beside the model too.
    return {**weights, **learnt, **{name: w for name, w in fixed.items() if ".interpolator." in name}}
