"""Heads of a vision transformer: what is said of attention patterns, and what the result can be asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vestige.errors import InputError
from vestige.evidence.probes.attention_patterns import Patterns, describe
from vestige.evidence.probes.patch_attention import landing_map, mean_distance, offset_map
from vestige.evidence.probes.vit_head_analytics import METRICS, HeadAnalytics, VitHeadAnalytics
from vestige.evidence.report.page import Page, Section, render

SIDE = 5


def attention(of):
    place = np.arange(SIDE * SIDE)
    return np.array([[float(of(i // SIDE, i % SIDE, j // SIDE, j % SIDE)) for j in place] for i in place])


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (lambda a, b, c, d: (a, b) == (c, d), "itself"),
        (lambda a, b, c, d: (a, b + 1) == (c, d), "next patch"),
        (lambda a, b, c, d: max(abs(a - c), abs(b - d)) <= 1, "neighbours"),
        (lambda a, b, c, d: a == c, "own row"),
        (lambda a, b, c, d: b == d, "own column"),
        (lambda a, b, c, d: (c, d) in ((0, 3), (4, 1)), "fixed places"),
        (lambda a, b, c, d: True, "everywhere"),
    ],
)
def test_patterns_are_named_by_where_attention_goes(of, name):
    maps = attention(of)
    maps = torch.from_numpy(maps / np.maximum(maps.sum(axis=1, keepdims=True), 1))
    assert describe(offset_map(maps, SIDE, SIDE).numpy(), landing_map(maps, SIDE, SIDE).numpy()) == name


def test_uniform_attention_looks_as_far_as_patches_are_apart():
    uniform = torch.full((4, 4), 0.2)  # a fifth goes to the class token
    assert mean_distance(uniform, 1, 4).item() == pytest.approx(np.mean([1.5, 1.0, 1.0, 1.5]))


def analytics() -> HeadAnalytics:
    chance = np.random.default_rng(0)
    value = np.array([[0.1, 0.4], [0.3, 0.0]])
    patterns = Patterns(
        ("itself", "everywhere"), chance.random((2, 7, 7)), chance.random((2, 4, 4)), np.array([0, 1, 0, 0]), value
    )
    return HeadAnalytics(
        importance=dict.fromkeys(METRICS, value),
        profile=chance.random((2, 2, 4)),
        distance=chance.random((2, 2)),
        to_class=chance.random((2, 2)),
        patterns=patterns,
        mixture=np.array([[[1.0, 0.0], [0.2, 0.8]], [[1.0, 0.0], [0.6, 0.4]]]),
        accuracy=0.9,
        images=10,
    )


def test_heads_are_ranked_and_told_of():
    found = analytics()
    assert found.ranking() == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert found.table()["pattern"].tolist() == ["itself", "everywhere", "itself", "itself"]
    with pytest.raises(InputError, match="speed"):
        found.ranking("speed")


def test_figures_stand_on_a_page():
    figures = analytics().figures()
    page = render(Page("Heads", "of a model", [Section("figures", "Figures", list(figures))], ""))
    assert all(f'id="{figure.name}"' in page for figure in figures)
    drawn = {figure.name: figure.figure for figure in figures}
    assert len(drawn["patterns"].data) == 2 and len(drawn["distance"].data[0].x) == 4


def test_measuring_a_small_model_fills_every_head(vit):
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = VitHeadAnalytics(kinds=2, steps=3).measure(vit, images)
    assert found.images == 3 and len(found.table()) == 8
    assert np.allclose(found.mixture.sum(axis=-1), 1) and np.allclose(
        found.profile.sum(-1) + found.to_class, 1, atol=1e-5
    )
