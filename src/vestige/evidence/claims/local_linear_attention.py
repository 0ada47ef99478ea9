"""Claims of local linear attention: where values change with their keys, a line misses less than a mean."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.layers.ops.local_linear import local_linear_attention

SHARPNESS = (1.0, 4.0, 16.0, 64.0)
"""Scalings of the scores that each may choose from: of softmax, how narrow a neighbourhood the mean is taken over."""


@claim
def a_line_misses_less_than_a_mean(case: LayerCase) -> Seen:
    """Values that bend with their keys are told at a new key with less error than softmax attention's, each with the
    sharpness that suits it best; and the error falls faster with the number of keys."""
    counts = (64, 512)
    line, mean = ([_errors(seed, counts, case.device, kind) for seed in case.seeds] for kind in ("line", "mean"))
    seen = {"keys": counts, "mean squared error": line, "of softmax attention": mean}
    for mine, theirs in zip(line, mean, strict=True):
        expect(all(a < b for a, b in zip(mine, theirs, strict=True)), f"softmax attention misses no more: {seen}")
        expect(mine[0] / mine[1] > theirs[0] / theirs[1], f"its error falls as fast with more keys: {seen}")
    return seen


def _errors(seed: int, counts: tuple[int, ...], device: str, kind: str) -> list[float]:
    """For each number of keys the mean squared error at new keys, with the best sharpness."""
    generator = torch.Generator().manual_seed(seed)
    dim, asked = 3, 256
    bend = torch.randn(dim, 8, generator=generator, dtype=torch.float64)
    keys = torch.randn(max(counts) + asked, dim, generator=generator, dtype=torch.float64)
    keys = keys / keys.norm(dim=-1, keepdim=True)  # then a score says how near a key is, and nothing else
    values = (keys @ bend).abs()
    found = []
    for count in counts:
        errors = []
        for sharpness in SHARPNESS:
            told = _told(keys[-asked:], keys[:count], values[:count], sharpness, device, kind)
            errors.append(float((told - values[-asked:].to(told)).square().mean()))
        found.append(min(errors))
    return found


def _told(asked: Tensor, keys: Tensor, values: Tensor, sharpness: float, device: str, kind: str) -> Tensor:
    """What is told at new keys from some keys and values. Every new key is a row of its own, which sees the keys."""
    q = asked[:, None, None].to(device)
    k, v = (t.expand(len(asked), 1, -1, -1).to(device) for t in (keys, values))
    if kind == "line":
        return local_linear_attention(q, k, v, scaling=sharpness, ridge=1e-4)[:, 0, 0]
    return ((sharpness * (q @ k.mT)).softmax(-1) @ v)[:, 0, 0]
