"""Intervals: how sure a measured number is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from vestige.errors import InputError, SpecError

__all__ = ["Interval", "bootstrap", "wilson"]


@dataclass(frozen=True)
class Interval:
    """A value, the bounds between which it lies at a level of confidence, and the number of measurements."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; unlike the plain one it is right near 0 and 1, and for few trials.

    Raises:
        SpecError: ``level`` is not between 0 and 1.
        InputError: no trials, or more successes than trials.
    """
    _check_level(level)
    if count < 1 or not 0 <= successes <= count:
        raise InputError(f"wilson: {successes} successes of {count} trials is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    return Interval(p, min(p, max(0.0, centre - reach)), max(p, min(1.0, centre + reach)), count)


def bootstrap(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: the measurements.
        groups: for each value the group that it belongs to (a seed, a document); whole groups are drawn, since
            the values of one group are not independent.
        level: confidence.
        draws: resamples.
        seed: of the resampling.

    Raises:
        SpecError: ``level`` or ``draws`` out of range.
        InputError: no values, or not one group per value.
    """
    import numpy as np

    _check_level(level)
    if type(draws) is not int or draws < 1:
        raise SpecError(f"bootstrap: parameter 'draws' is {draws!r}; allowed: int >= 1")
    if not values or (groups is not None and len(groups) != len(values)):
        raise InputError(f"bootstrap: {len(values)} values in {len(groups or ())} named groups; one group per value")
    labels = list(range(len(values))) if groups is None else list(groups)
    names = list(dict.fromkeys(labels))
    totals, sizes = np.zeros(len(names)), np.zeros(len(names))
    place = {name: i for i, name in enumerate(names)}
    for value, label in zip(values, labels, strict=True):
        totals[place[label]] += value
        sizes[place[label]] += 1
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(totals.sum() / sizes.sum()), float(low), float(high), len(values))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise SpecError(f"parameter 'level' is {level!r}; allowed: between 0 and 1, both excluded")
