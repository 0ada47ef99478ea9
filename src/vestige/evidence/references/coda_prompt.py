"""CODA-Prompt (arXiv 2211.13218, section 4): prompts of components, in the first layers of a frozen transformer.

    q      state of the class token, after the last norm, of the model without prompts
    p      = sum_m cos(q * A_m, K_m) P_m                              for each layer
    k, v   <- [first half of p; k], [second half of p; v]             in its attention
    L      = CE among the experience's classes + lambda sum over layers of sum over B in P, K, A of |B B^T - I|^2 / m^2

Each experience adds components at right angles to all earlier ones, which stay as they are, by Gram-Schmidt. Only the
newest components and the output layer are trained. P counts as vectors of all its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.evidence.references.learning import Experience, Net, Weights, cross_entropy, descend

__all__ = ["learn"]

SEED = 42
"""The seed that training has where none is given."""
PARTS = ("prompts", "keys", "attention")


def gram_schmidt(before: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Unit vectors (count, dim), each without what lies along earlier ones."""
    basis: list[Tensor] = []
    for v in [*before, *torch.randn(count, before.shape[1], generator=draw, dtype=torch.float64)]:
        for _ in range(2):  # twice, so that rounding leaves nothing either
            for e in basis:
                v = v - (v @ e) * e
        basis.append(v / v.norm())
    return torch.stack(basis[len(before) :])


def assembled(q: Tensor, P: Tensor, K: Tensor, A: Tensor) -> Tensor:
    """p (length, width) for one query (dim,)."""
    total = torch.zeros_like(P[0])
    for P_m, K_m, A_m in zip(P, K, A, strict=True):
        looked = q * A_m
        total = total + (looked @ K_m) / (looked.norm() * K_m.norm()) * P_m
    return total


def class_state(net: Net, w: Weights, x: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """The class token's last state (dim,) for one image; prompts (length, width) by layer."""
    config = net.module.config
    d, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, (d,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patches = "vit.embeddings.patch_embeddings.projection"
    grid = F.conv2d(x[None], w[f"{patches}.weight"], w[f"{patches}.bias"], stride=config.patch_size)
    h = torch.cat([w["vit.embeddings.cls_token"][0], grid.flatten(2)[0].T]) + w["vit.embeddings.position_embeddings"][0]
    for layer in range(config.num_hidden_layers):
        block = f"vit.layers.{layer}"
        inside = norm(f"{block}.layernorm_before", h)
        q, k, v = (linear(f"{block}.attention.{part}_proj", inside) for part in "qkv")
        if layer in prompts:
            half = len(prompts[layer]) // 2
            k, v = torch.cat([prompts[layer][:half], k]), torch.cat([prompts[layer][half:], v])
        width = d // heads
        mixed = []
        for n in range(heads):
            own = slice(n * width, (n + 1) * width)
            mixed.append((q[:, own] @ k[:, own].T / math.sqrt(width)).softmax(-1) @ v[:, own])
        h = h + linear(f"{block}.attention.o_proj", torch.cat(mixed, dim=-1))
        inside = norm(f"{block}.layernorm_after", h)
        h = h + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", inside)))
    return norm("vit.layernorm", h)[0]


def learn(
    net: Net,
    weights: Weights,
    experiences: Sequence[Experience],
    *,
    lr: float,
    epochs: int,
    components: int,
    length: int,
    depth: int,
    orthogonality: float,
) -> Weights:
    """See :mod:`vestige.evidence.references.learning`; the weights come with ``layer.part`` for the components."""
    d = net.module.config.hidden_size
    layers = range(min(depth, net.module.config.num_hidden_layers))
    draw = torch.Generator().manual_seed(SEED)
    shapes = {"prompts": (length, d), "keys": (d,), "attention": (d,)}
    held = {f"{n}.{part}": torch.empty(0, *shapes[part], dtype=torch.float64) for n in layers for part in PARTS}
    for e in experiences:
        learnt = {name: w for name, w in weights.items() if name.startswith("classifier.")}
        for name, old in held.items():
            shape = shapes[name.split(".")[1]]
            learnt[name] = gram_schmidt(old.reshape(len(old), math.prod(shape)), components, draw).reshape(-1, *shape)

        def loss(v: Weights, e: Experience = e, weights: Weights = weights, held: Weights = held) -> Tensor:
            every = {name: torch.cat([held[name], v[name]]) for name in held}
            states = []
            for x in e.x:
                q = class_state(net, weights, x, {}).detach()
                prompts = {n: assembled(q, *(every[f"{n}.{part}"] for part in PARTS)) for n in layers}
                states.append(class_state(net, weights, x, prompts))
            z = torch.stack(states) @ v["classifier.weight"].T + v["classifier.bias"]
            value = cross_entropy(z[:, e.classes], torch.tensor([e.classes.index(int(c)) for c in e.y]))
            for part in every.values():
                B = part.reshape(len(part), -1)
                value = value + orthogonality * ((B @ B.T - torch.eye(len(B), dtype=B.dtype)) ** 2).mean()
            return value

        for _ in range(epochs):
            learnt = descend(loss, learnt, lr)
        held = {name: torch.cat([held[name], learnt[name]]).detach() for name in held}
        weights = {name: learnt.get(name, w) for name, w in weights.items()}
    return {**weights, **held}
