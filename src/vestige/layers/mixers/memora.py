"""Memora: a memory whose weights are shares."""

from __future__ import annotations

from vestige.core.method import Paper, Verdict, param
from vestige.layers.mixers.miras import MirasLayer, MirasMixer
from vestige.layers.ops.learning.retentions import Retention

__all__ = ["Memora", "MemoraLayer"]


class MemoraLayer(MirasLayer):
    """The layer of :class:`Memora`."""


class Memora(MirasMixer):
    """Keep each output's weights a distribution, and change it by as little divergence as the error allows.

    The logarithms of the weights are what fades and is added to: forgetting makes all inputs equal, and no weight
    can grow without others giving way.
    """

    name = "memora"
    paper = Paper(
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        year=2025,
        arxiv="2504.13173",
        equations="section 5.3, equation 27; gates per head and token, where the paper has them per channel",
    )
    verdict = Verdict(
        "reproduced",
        "Told values a thousand times too large it answers with at most 0.68; a memory whose weights only"
        " fade with 142 to 233 (3 seeds, untrained). Language modelling at scale was not looked at.",
    )
    layer = MemoraLayer

    mass: float = param(1.0, "sum of each output's weights", gt=0)
    by_block: bool = param(False, "whether queries are answered with the weights at the beginning of their block")

    def retention(self) -> Retention:
        return Retention("kl", mass=self.mass)
