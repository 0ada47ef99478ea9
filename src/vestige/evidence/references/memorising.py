r"""What the references of memories that learn share: the rule, token by token, with slopes that autograd finds.

.. math::
    S_t = \eta_t S_{t-1} - \sum_{t-c<i\le t} \theta_i \nabla_W \ell(M_W(k_i), v_i)\big|_{W = W_b}, \qquad
    A_t = \alpha_t A_{t-1} + \lambda_t T(S_t), \qquad W_t = \varphi(A_t), \qquad o_t = M_{W_t}(q_t),

where :math:`W_b` are the weights at the beginning of the block of ``refresh`` tokens that :math:`t` is in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.evidence.references.mixing import Weights, by_head, linear, rms_norm, short_convolution, silu, softplus

__all__ = ["answered", "memorise", "mix_with", "monomials", "muon", "projected", "read_out"]

Matrices = list[Tensor]


def answered(
    weights: Matrices, x: Float[Tensor, " inputs"], skip: Float[Tensor, " dim"], gain: Tensor, residual: bool
) -> Float[Tensor, " dim"]:
    """A perceptron with GELU between its layers, and perhaps the input plus its normalised output."""
    for index, W in enumerate(weights):
        x = F.gelu(x) if index else x
        x = W @ x
    if not residual:
        return x
    return skip + gain * (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()


def loss(name: str, answer: Tensor, value: Tensor, power: float, bound: Tensor | float) -> Tensor:
    """The attentional biases."""
    error = answer - value
    if name == "l2":
        return error @ error
    if name == "lp":
        return (error.square() + 1e-6).pow(power / 2).sum()
    if name == "dot":
        return -answer @ value
    size = (error @ error + 1e-12).sqrt()
    return error @ error / 2 if size <= bound else bound * size


def retained(name: str, A: Tensor, power: float, mass: float) -> Tensor:
    """The retention gates; a row of a matrix belongs to one output."""
    if name == "kl":
        return mass * torch.exp(A) / torch.exp(A).sum(1, keepdim=True)
    if name == "q-norm":
        return A / A.abs().pow(power).sum().pow((power - 2) / power)
    return A


def muon(matrix: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz as Muon does it, on the wider side."""
    if matrix.shape[0] < matrix.shape[1]:
        return muon(matrix.T, iterations).T
    X = matrix / (matrix.square().sum() + 1e-14).sqrt()
    for _ in range(iterations):
        B = X.T @ X
        X = 3.4445 * X - 4.7750 * X @ B + 2.0315 * X @ B @ B
    return X


def monomials(x: Float[Tensor, " dim"], feature: str, degree: int, scale: Tensor | None) -> Float[Tensor, " features"]:
    """Features of a key: products of its channels, each times a factor for their number, and by the root of the number
    of ways to write it down, so that features multiply to powers of the keys' product."""
    if feature == "none" or scale is None:
        return x
    if feature == "powers":
        return torch.cat([scale[power] * x**power for power in range(1, degree + 1)])
    chosen, factors = list(combinations_with_replacement(range(len(x) + 1), degree)), []
    for channels in chosen:
        counts = Counter(channel for channel in channels if channel < len(x))  # the last stands for a one
        ways = math.factorial(counts.total()) / math.prod(math.factorial(n) for n in counts.values())
        factors.append(math.sqrt(ways) * scale[counts.total()])
    return torch.cat([x, torch.ones_like(x[:1])])[torch.tensor(chosen)].prod(1) * torch.stack(factors)


def memorise(
    q: Float[Tensor, "T dim"],
    k: Float[Tensor, "T dim"],
    v: Float[Tensor, "T dim"],
    start: Matrices,
    gain: Float[Tensor, " dim"],
    *,
    alpha: Float[Tensor, " T"],
    theta: Float[Tensor, " T"],
    eta: Float[Tensor, " T"] | None = None,
    lam: Float[Tensor, " T"] | None = None,
    delta: Float[Tensor, " T"] | None = None,
    refresh: int,
    residual: bool,
    bias: str = "l2",
    power: float = 2.0,
    retention: str = "decay",
    q_norm: float = 4.0,
    mass: float = 1.0,
    window: int = 1,
    newton_schulz: int = 0,
    by_block: bool = False,
    features: Callable[[Tensor], Tensor] = lambda x: x,
    still: range = range(0),
) -> Float[Tensor, "T dim"]:
    """One head, one sequence; the tokens of ``still`` ask, and teach nothing."""

    def weights_of(totals: Matrices) -> Matrices:
        return [retained(retention, A, q_norm, mass) for A in totals]

    def slopes(W: Matrices, i: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            W = [w + torch.zeros_like(w).requires_grad_() for w in W]
            answer = answered(W, features(k[i]), k[i], gain, residual)
            bound = 0.0 if delta is None else delta[i]
            return torch.autograd.grad(loss(bias, answer, v[i], power, bound), W, create_graph=True)

    A, S = list(start), [torch.zeros_like(w) for w in start]
    known: dict[int, tuple[Tensor, ...]] = {}  # slopes at the point of now
    point, due, rows = weights_of(A), torch.zeros_like(alpha[0]), []
    for t in range(len(q)):
        if t in still:
            rows.append(answered(weights_of(A), features(q[t]), q[t], gain, residual))
            continue
        seen = range(max(0, t - window + 1), t + 1)
        for i in seen:
            if i not in known:
                known[i] = slopes(point, i)
        found, rates = [known[i] for i in seen], theta[seen.start : seen.stop]
        total = [sum(r * g for r, g in zip(rates, layer, strict=True)) for layer in zip(*found, strict=True)]
        S = [(eta[t] * s if eta is not None else 0) - g for s, g in zip(S, total, strict=True)]
        step = 1.0 if lam is None else lam[t]
        if newton_schulz and by_block:
            A, due = [alpha[t] * a for a in A], alpha[t] * due + step
        else:
            moved = [muon(s, newton_schulz) if newton_schulz else s for s in S]
            A = [alpha[t] * a + step * s for a, s in zip(A, moved, strict=True)]
        rows.append(answered(point if by_block else weights_of(A), features(q[t]), q[t], gain, residual))
        if (t + 1) % refresh == 0:
            if newton_schulz and by_block:
                A = [a + due * muon(s, newton_schulz) for a, s in zip(A, S, strict=True)]
                due = torch.zeros_like(due)
            point, known = weights_of(A), {}
    return torch.stack(rows)


def projected(x: Float[Tensor, "T hidden"], weights: Weights, heads: int, conv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values by head; the first two of length one."""
    parts = [linear(x, weights, name) for name in ("q_proj", "k_proj", "v_proj")]
    if conv:
        taps = weights["conv.weight"].split([part.shape[-1] for part in parts])
        parts = [short_convolution(part, tap) for part, tap in zip(parts, taps, strict=True)]
    else:
        parts = [silu(part) for part in parts]
    q, k, v = (by_head(part, heads) for part in parts)
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    return q, k, v


def gates_of(
    x: Float[Tensor, "T hidden"], weights: Weights, heads: int, names: tuple[str, ...], rate: float, step: float
) -> dict[str, Float[Tensor, "T heads"]]:
    """Each gate by the name of its symbol."""
    raw = (linear(x, weights, "gate_proj") + weights["gate_bias"]).reshape(len(x), len(names), heads)
    shape = {
        "alpha": lambda z: torch.sigmoid(z) ** (1 / 16),
        "theta": lambda z: rate * torch.sigmoid(z),
        "eta": torch.sigmoid,
        "lam": lambda z: step * torch.sigmoid(z),
        "delta": softplus,
    }
    return {name: shape[name](raw[:, index]) for index, name in enumerate(names)}


def memories(
    x: Float[Tensor, "T hidden"],
    q: Float[Tensor, "T heads dim"],
    k: Float[Tensor, "T heads dim"],
    v: Float[Tensor, "T heads dim"],
    weights: Weights,
    *,
    gates: tuple[str, ...],
    rate: float,
    step: float = 1.0,
    depth: int,
    residual: bool,
    feature: str = "none",
    degree: int = 1,
    **rule: Any,
) -> Float[Tensor, "T heads dim"]:
    """Every head on its own."""
    heads, dim = q.shape[1:]
    said = gates_of(x, weights, heads, gates, rate, step)
    scale = weights.get("feature_scale")
    outputs = []
    for h in range(heads):
        start = [weights[f"memory.{n}"].reshape(heads, -1, weights[f"memory.{n}"].shape[1])[h] for n in range(depth)]
        gain = weights["memory_norm"].reshape(heads, dim)[h] / dim**0.5 if residual else torch.ones_like(x[0])
        own = {name: gate[:, h] for name, gate in said.items()}
        outputs.append(
            memorise(
                q[:, h],
                k[:, h],
                v[:, h],
                start,
                gain,
                residual=residual,
                features=lambda key: monomials(key, feature, degree, scale),
                **own,
                **rule,
            )
        )
    return torch.stack(outputs, 1)


def read_out(
    read: Float[Tensor, "T heads dim"], x: Float[Tensor, "T hidden"], weights: Weights, eps: float
) -> Float[Tensor, "T hidden"]:
    """Normalised by head, gated, mixed."""
    gate = silu(by_head(linear(x, weights, "g_proj"), read.shape[1]))
    return linear((rms_norm(read, weights["norm.norm.weight"], eps) * gate).flatten(1), weights, "o_proj")


def mix_with(
    x: Float[Tensor, "T hidden"], weights: Weights, place: Any, *, heads: int | None, conv: int, **rule: Any
) -> Float[Tensor, "T hidden"]:
    """The whole layer."""
    heads = heads or place.heads
    q, k, v = projected(x, weights, heads, conv)
    return read_out(memories(x, q, k, v, weights, **rule), x, weights, place.eps)
