"""Yaad: a memory that large errors do not throw off."""

from __future__ import annotations

from vestige.core.method import Paper, Verdict
from vestige.layers.mixers.miras import MirasLayer, MirasMixer
from vestige.layers.ops.learning.biases import Bias

__all__ = ["Yaad", "YaadLayer"]


class YaadLayer(MirasLayer):
    """The layer of :class:`Yaad`."""


class Yaad(MirasMixer):
    """Learn from Huber's loss: an error beyond a bound, which each token sets, moves the memory no more than the bound.

    So a value that fits nothing spoils little of what is held.
    """

    name = "yaad"
    paper = Paper(
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        year=2025,
        arxiv="2504.13173",
        equations="section 5.3, equation 26, with half the square below the bound, so that the slope has no jump",
    )
    verdict = Verdict(
        "reproduced",
        "Where every fourth value is 20 times too large, the others are answered with an error of 0.19 to"
        " 0.27; by a memory that learns from squares with 1.8 to 2.2 (3 seeds, untrained).",
    )
    layer = YaadLayer

    def bias(self) -> Bias:
        return Bias("huber")
