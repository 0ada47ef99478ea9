"""FPF (arXiv 2304.04158): after each experience but the first, the modules that forget are fine-tuned on stored rows.

For a module l with weights theta_l, over the switches and the ends of experiences,

    drift_l = sum over switches of |theta_l(after the first epoch) - theta_l(before)|_1 / |theta_l|
    calm_l  = sum over experiences of |theta_l(end) - theta_l(before the last epoch)|_1 / |theta_l|

The modules with the largest drift / calm are taken until they account for a share of its sum. They are fine-tuned by
descent with momentum 0.9, v <- 0.9 v + g, theta <- theta - lr v, with g scaled down to a norm of 1 if it is larger.
Here the store holds all rows and every batch takes all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend, gradient

__all__ = ["SMALL", "learn"]

SMALL = {"size": 1000, "batch": 1000, "steps": 3}


def change(now: Weights, then: Weights) -> dict[str, float]:
    """L1 change of each module, per weight."""
    sums: dict[str, float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    for name, w in now.items():
        module = name.rpartition(".")[0]
        sums[module] += float((w - then[name]).abs().sum())
        sizes[module] += w.numel()
    return {module: sums[module] / sizes[module] for module in sums}


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    steps: int,
    learning_rate: float,
    modules: str,
    share: float,
    **hyper: object,
) -> Weights:
    """The form that runs after each experience, without distillation; needs two epochs or more."""
    drift: dict[str, float] = defaultdict(float)
    calm: dict[str, float] = defaultdict(float)
    for n, e in enumerate(experiences):
        path = [weights]
        for _ in range(epochs):
            path.append(descend(lambda w, e=e: cross_entropy(net.logits(w, e.x), e.y), path[-1], lr))  # type: ignore[misc]
        weights = path[-1]
        for total, new in ((drift, change(path[1], path[0]) if n else {}), (calm, change(path[-1], path[-2]))):
            for module, value in new.items():
                total[module] += value
        if n == 0:
            continue
        score = {module: drift[module] / max(calm[module], 1e-12) for module in drift}
        taken: list[str] = []
        for module in sorted(score, key=lambda m: -score[m]):
            if modules == "all" or sum(score[m] for m in taken) < share * sum(score.values()):
                taken.append(module)
        x, y = torch.cat([s.x for s in experiences[: n + 1]]), torch.cat([s.y for s in experiences[: n + 1]])
        tuned = [name for name in weights if name.rpartition(".")[0] in taken]
        v = {name: torch.zeros_like(weights[name]) for name in tuned}
        for _ in range(steps):

            def loss(w: Weights, x: Tensor = x, y: Tensor = y) -> Tensor:
                return cross_entropy(net.logits(w, x), y)

            g = gradient(loss, weights)
            norm = float(sum((g[name] ** 2).sum() for name in tuned) ** 0.5)
            for name in tuned:
                v[name] = 0.9 * v[name] + g[name] / max(norm, 1.0)
                weights = {**weights, name: weights[name] - learning_rate * v[name]}
    return weights
