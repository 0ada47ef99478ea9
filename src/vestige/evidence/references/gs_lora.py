"""Group-sparse LoRA: W + s B A beside the chosen maps, down

    b relu(K - CE_forget) + c CE_retain + a sum over groups of |g|   (a = 0 before the warm-up is over)
    + w_f relu(K' - D_forget) + w_r D_retain                         (with prototypes)

CE is a mean over rows; |g| is the norm of all A and B of a group; D is the mean over rows of KL(softmax m, softmax z)
with z the answer and m the untouched model's mean answer to rows of the class (in a language model: to the token).
A is drawn evenly within 1 / sqrt(inputs), map by map, block by block; B starts at zero. K is 2 ln(classes) where it
is not given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vestige.evidence.references.erasing import Weights, descend, mean

__all__ = ["erase"]

SMALL = {
    "learning_rate": 1e-2,
    "epochs": 20,
    "target": 0.02,
    "check_every": 1,
    "forget_weight": 0.5,  # with the authors' 0.15 a digit that is known all too well does not even begin to go
    "prototype_retain_weight": 0.05,
}
USE = 2 * 7919
"""The seed of the first matrices, where that of the run is 0."""


def divergence(due: Tensor, z: Tensor) -> Tensor:
    """KL(softmax due, softmax z), the mean over labels."""
    p, log_p, log_q = due.softmax(1), due.log_softmax(1), z.log_softmax(1)
    return (p * (log_p - log_q)).sum(1).mean()


def erase(
    row_loss: Any,
    row_logits: Any,
    linear: dict[str, list[list[str]]],
    causal: bool,
    weights: Weights,
    forget: list[Any],
    retain: list[Any],
    learning_rate: float,
    epochs: int,
    clip: float | None,
    retain_weight: float,
    rank: int,
    scale: float,
    where: str,
    group: str,
    forget_weight: float,
    bound: float | None,
    sparsity: float,
    warm_up: float,
    prototypes: bool,
    prototype_weight: float,
    prototype_bound: float | None,
    prototype_retain_weight: float,
) -> Weights:
    """The weights with the matrices merged into them."""
    parts = ["attention", "mlp"] if where == "both" else [where]
    blocks = [[name for part in parts for name in linear[part][n]] for n in range(len(linear["mlp"]))]
    chosen = [name for block in blocks for name in block]
    draw = torch.Generator().manual_seed(USE)
    matrices: Weights = {}
    for name in chosen:
        outputs, inputs = weights[name].shape
        even = torch.rand(rank, inputs, generator=draw, dtype=torch.float64)
        matrices[f"A {name}"] = (2 * even - 1) / math.sqrt(inputs)
        matrices[f"B {name}"] = torch.zeros(outputs, rank, dtype=torch.float64)
    groups = {
        "block": [[f"{m} {name}" for name in block for m in "AB"] for block in blocks],
        "map": [[f"A {name}", f"B {name}"] for name in chosen],
        "matrix": [[f"{m} {name}"] for name in chosen for m in "AB"],
    }[group]
    classes = row_logits(weights, forget[0])[0].shape[1]
    most = 2 * math.log(classes) if bound is None else bound

    answers = [(row_logits(weights, row)) for row in forget + retain]

    def due(row: Any, labels: Tensor) -> Tensor:
        if causal:
            return row_logits(weights, row)[0]
        same = [[z[0] for z, y in answers if y == label] for label in labels]
        return torch.stack([torch.stack(rows).mean(0) for rows in same])

    def distance(w: Weights, rows: list[Any]) -> Tensor:
        found = [row_logits(w, row) for row in rows]
        return mean([divergence(due(row, y), z) for row, (z, y) in zip(rows, found, strict=True)])

    def merged(m: Weights) -> Weights:
        return {
            name: w.double() + scale * m[f"B {name}"] @ m[f"A {name}"] if name in chosen else w.double()
            for name, w in weights.items()
        }

    def dense(m: Weights) -> Tensor:
        w = merged(m)
        loss = forget_weight * (most - mean([row_loss(w, row) for row in forget])).relu()
        loss = loss + retain_weight * mean([row_loss(w, row) for row in retain])
        if prototypes:
            loss = loss + prototype_weight * ((prototype_bound or most) - distance(w, forget)).relu()
            loss = loss + prototype_retain_weight * distance(w, retain)
        return loss

    def sparse(m: Weights) -> Tensor:
        norms = [torch.stack([m[name].square().sum() for name in names]).sum().sqrt() for names in groups]
        return dense(m) + sparsity * torch.stack(norms).sum()

    found = descend(dense, matrices, learning_rate, epochs, clip, later=sparse, start=warm_up * epochs)
    return {name: w.detach() for name, w in merged(found).items()}
