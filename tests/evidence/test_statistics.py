"""Intervals against published values and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vestige.errors import InputError, SpecError
from vestige.evidence.statistics import bootstrap, wilson


def test_wilson_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for successes, count in ((0, 10), (3, 10), (10, 10), (47, 120)):
        expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
        found = wilson(successes, count)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert found.value == successes / count and found.low <= found.value <= found.high


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    chance = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = bootstrap(chance.normal(1.0, 2.0, size=40).tolist(), level=0.9, draws=400, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 0.82 <= hits / 200 <= 0.96


def test_groups_that_agree_within_widen_the_interval():
    chance = np.random.default_rng(1)
    values = np.repeat(chance.normal(size=8), 10).tolist()
    groups = np.repeat(np.arange(8), 10).tolist()
    alone, grouped = bootstrap(values), bootstrap(values, groups)
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="3 successes of 2"):
        wilson(3, 2)
    with pytest.raises(SpecError, match="level"):
        wilson(1, 2, level=1.0)
    with pytest.raises(InputError):
        bootstrap([])
    with pytest.raises(InputError):
        bootstrap([1.0], groups=[1, 2])
    with pytest.raises(SpecError, match="draws"):
        bootstrap([1.0], draws=0)
