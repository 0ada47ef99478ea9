"""Adaptive SVD (arXiv 2504.07097, section 3): each matrix W of the blocks learns outside its largest directions.

Before an experience W = U S V^T; k directions stay, U_h and V_h, with

    I  = mean_i cos(x_i, W x_i + b) on the data so far, over the features that input and output share,
    I' = I / mean of I over the matrices,   r = least + I' (most - least),
    k  = floor(r min(out, in)), at most min(out, in) - 1.

A step moves W by -lr (G - U_h U_h^T G V_h V_h^T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, gradient

__all__ = ["learn"]


def blocks(net: Net) -> list[str]:
    """Names of the matrices inside the blocks."""
    return [n for n, w in net.module.named_parameters() if ".layers." in n and w.ndim == 2]


def cosines(net: Net, weights: Weights, e: Experience) -> dict[str, float]:
    """Importance of each matrix on the rows and positions of one experience."""
    seen: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            values = []
            for x, y in zip(args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]), strict=True):
                width = min(len(x), len(y))
                a, b = x[:width], y[:width]
                values.append(float(a @ b / (a.norm() * b.norm())))
            seen[name] = sum(values) / len(values)

        return hook

    handles = [net.module.get_submodule(n.removesuffix(".weight")).register_forward_hook(look(n)) for n in blocks(net)]
    with torch.no_grad():
        net.logits(weights, e.x)
    for handle in handles:
        handle.remove()
    return seen


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    least: float,
    most: float,
    frozen: float,
    from_start: bool,
    rows: int,
) -> Weights:
    """``rows`` is a saving: here every row is looked at. After plain descent there is nothing to be put back."""
    found: list[dict[str, float]] = []
    for n, e in enumerate(experiences):
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        if n or from_start:
            known = found or [cosines(net, weights, e)]
            importance = {name: sum(each[name] for each in known) / len(known) for name in blocks(net)}
            mean = sum(importance.values()) / len(importance)
            for name in blocks(net):
                U, _, Vh = torch.linalg.svd(weights[name])
                d = min(weights[name].shape)
                r = frozen or least + importance[name] / mean * (most - least)
                k = min(max(int(r * d), 0), d - 1)
                kept[name] = U[:, :k], Vh[:k].T
        for _ in range(epochs):
            G = gradient(lambda w, e=e: cross_entropy(net.logits(w, e.x), e.y), weights)  # type: ignore[misc]
            for name, (U_h, V_h) in kept.items():
                G[name] = G[name] - U_h @ U_h.T @ G[name] @ V_h @ V_h.T
            weights = {name: w - lr * G[name] for name, w in weights.items()}
        found.append(cosines(net, weights, e))
    return weights
