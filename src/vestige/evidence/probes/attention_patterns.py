"""Kinds of attention patterns: maps of many heads, put in order by an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.packages import need
from vestige.errors import InputError

__all__ = ["Patterns", "check_maps", "describe", "find_patterns"]

WIDTH, RATE = 64, 3e-3  # of the autoencoder's hidden layers; of learning


@dataclass(frozen=True)
class Patterns:
    """Kinds of patterns, the most frequent first.

    Attributes:
        names: what each kind does, in words; see :func:`describe`.
        offsets: mean map by step of each kind.
        landings: mean map by place of each kind.
        kinds: the kind of each map that was given.
        codes: what the autoencoder makes of each map.
    """

    names: tuple[str, ...]
    offsets: Float[np.ndarray, "kinds heights widths"]
    landings: Float[np.ndarray, "kinds rows columns"]
    kinds: Int[np.ndarray, " maps"]
    codes: Float[np.ndarray, "maps code"]


def find_patterns(
    offsets: Float[Tensor, "maps heights widths"],
    landings: Float[Tensor, "maps rows columns"],
    *,
    kinds: int,
    code: int,
    steps: int,
    seed: int,
) -> Patterns:
    """Sort attention maps into kinds.

    An autoencoder learns to give back each map, by step and by place, from a few numbers; maps whose numbers lie
    together (k-means) are of a kind.

    Args:
        offsets, landings: see :mod:`vestige.evidence.probes.patch_attention`.
        kinds: how many there are at most.
        code: how many numbers.
        steps: the autoencoder's optimiser steps.
        seed: of its weights, and of the clusters.

    Raises:
        InputError: fewer maps than kinds.
        MissingPackageError: scikit-learn is absent.
    """
    check_maps(len(offsets), kinds)
    from sklearn.cluster import KMeans

    parts = [_shares(offsets), _shares(landings)]
    codes = _codes(torch.cat(parts, dim=1), [part.shape[1] for part in parts], code, steps, seed)
    found = KMeans(kinds, n_init=4, random_state=seed).fit_predict(codes)
    ranked = [kind for kind, _ in sorted(zip(*np.unique(found, return_counts=True), strict=True), key=lambda k: -k[1])]
    place = {kind: rank for rank, kind in enumerate(ranked)}
    number = np.array([place[kind] for kind in found])
    by_step, by_place = (
        np.stack([maps[number == rank].mean(axis=0) for rank in range(len(ranked))])
        for maps in (offsets.double().numpy(), landings.double().numpy())
    )
    names = tuple(describe(step, spot) for step, spot in zip(by_step, by_place, strict=True))
    return Patterns(names, by_step, by_place, number, codes)


def check_maps(maps: int, kinds: int) -> None:
    """Raise what :func:`find_patterns` raises, before there are maps."""
    need("kinds of attention patterns", "weights", "sklearn")
    if maps < kinds:
        raise InputError(f"there are {maps} attention maps; {kinds} kinds need at least as many")


def describe(offsets: Float[np.ndarray, "heights widths"], landings: Float[np.ndarray, "rows columns"]) -> str:
    """What a pattern does, by where most of its attention goes: maps as :mod:`vestige.evidence.probes.patch_attention`
    gives them, in words.

    The first of these that has at least half of the attention: ``itself``, ``next patch`` (one of the eight around, the
    same for all), ``fixed places`` (those with twice the mean, together), ``own row``, ``own column``, ``neighbours``
    (with the patch itself); else ``everywhere``.
    """
    rows, columns = landings.shape
    pairs = np.outer(rows - abs(np.arange(1 - rows, rows)), columns - abs(np.arange(1 - columns, columns)))
    total = offsets * pairs / (offsets * pairs).sum()
    y, x = (size // 2 for size in total.shape)
    near = total[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
    around = near.copy()
    around[min(1, y), min(1, x)] = 0
    if total[y, x] >= 0.5:
        return "itself"
    if around.max() >= 0.5:
        return "next patch"
    spots = landings / landings.sum()
    if spots[spots >= 2 / spots.size].sum() >= 0.5:
        return "fixed places"
    if total[y].sum() >= 0.5:
        return "own row"
    if total[:, x].sum() >= 0.5:
        return "own column"
    return "neighbours" if near.sum() >= 0.5 else "everywhere"


def _shares(maps: Tensor) -> Tensor:
    flat = maps.flatten(1).float()
    return flat / flat.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _codes(maps: Tensor, sizes: list[int], code: int, steps: int, seed: int) -> np.ndarray:
    """What the autoencoder makes of each map. Both parts are distributions, and are given back as such."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        inputs = maps.sqrt()  # small shares count, too
        inputs = inputs - inputs.mean(dim=0)
        into = nn.Sequential(nn.Linear(maps.shape[1], WIDTH), nn.GELU(), nn.Linear(WIDTH, code))
        back = nn.Sequential(nn.Linear(code, WIDTH), nn.GELU(), nn.Linear(WIDTH, maps.shape[1]))
        optimiser = torch.optim.AdamW([*into.parameters(), *back.parameters()], lr=RATE)
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            some = torch.randint(len(maps), (min(256, len(maps)),), generator=order)
            given = back(into(inputs[some])).split(sizes, dim=1)
            due = maps[some].split(sizes, dim=1)
            loss = sum(F.cross_entropy(mine, wanted) for mine, wanted in zip(given, due, strict=True))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimiser.step()
        with torch.no_grad():
            return into(inputs).double().numpy()
