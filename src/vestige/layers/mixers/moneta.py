"""Moneta: a memory that learns from the p-norm of its errors, its weights kept by a q-norm."""

from __future__ import annotations

from vestige.core.method import Paper, Verdict, param
from vestige.layers.mixers.miras import MirasLayer, MirasMixer
from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.retentions import Retention

__all__ = ["Moneta", "MonetaLayer"]


class MonetaLayer(MirasLayer):
    """The layer of :class:`Moneta`."""


class Moneta(MirasMixer):
    """Learn from a power of each error, so that large ones count for more, and keep the weights on a q-norm's scale.

    What is added up fades; the weights are that over a power of its q-norm.
    """

    name = "moneta"
    paper = Paper(
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        year=2025,
        arxiv="2504.13173",
        equations="section 5.3, equations 24 and 25; gates per head and token, where the paper has them per channel",
    )
    verdict = Verdict(
        "reproduced",
        "Told 16 pairs three times, the largest error of a channel is 0.40 to 0.50; with squares in place"
        " of cubes 0.47 to 0.59 (3 seeds, untrained). Language modelling at scale was not looked at.",
    )
    layer = MonetaLayer

    p: float = param(3.0, "power of the errors", ge=1)
    q: float = param(4.0, "norm that the weights are kept by", ge=1)
    by_block: bool = param(False, "whether queries are answered with the weights at the beginning of their block")

    def bias(self) -> Bias:
        return Bias("lp", self.p)

    def retention(self) -> Retention:
        return Retention("q-norm", self.q)
