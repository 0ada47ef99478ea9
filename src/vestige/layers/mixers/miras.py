"""Miras: a memory as four choices, each of which can be made on its own."""

from __future__ import annotations

from typing import Literal

from vestige.core.method import Paper, Verdict, param
from vestige.layers.mixers.learning import ConvolvedMixer, LearningLayer
from vestige.layers.ops.learning.biases import Bias, BiasName
from vestige.layers.ops.learning.engine import Rule
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.retentions import Retention, RetentionName

__all__ = ["Miras", "MirasLayer", "MirasMixer"]


class MirasLayer(LearningLayer):
    """The layer of :class:`Miras` and of its models. Without momentum it holds no ``surprise``."""


class MirasMixer(ConvolvedMixer):
    """Base of Miras' models: what each of the four choices is, from parameters or once and for all."""

    def bias(self) -> Bias:
        """What the memory is asked to make small."""
        return Bias()

    def retention(self) -> Retention:
        """How its weights follow from what is added up."""
        return Retention()

    def gates(self) -> tuple[str, ...]:
        return ("decay", "rate", "bound") if self.bias().name == "huber" else ("decay", "rate")

    def rule(self) -> Rule:
        return Rule(
            memory=self.network(),
            bias=self.bias(),
            retention=self.retention(),
            refresh=self.refresh,
            by_block=getattr(self, "by_block", False),
        )


class Miras(MirasMixer):
    """A memory made of four choices: what it is, what it is asked to make small, how it keeps, how it learns.

    ``memory="matrix", loss="dot"`` is gated linear attention, ``memory="matrix", loss="l2"`` the gated delta rule,
    ``learning="momentum"`` Titans; ``moneta``, ``yaad`` and ``memora`` are three more, with names of their own.
    """

    name = "miras"
    paper = Paper(
        title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        year=2025,
        arxiv="2504.13173",
        equations="sections 3 to 5; gates per head and token, where the paper has them per channel",
    )
    verdict = Verdict(
        "reproduced",
        "Moneta, Yaad, Memora and Titans come out of its four choices to the last digit, and each choice "
        "changes the answers. Which choice is best at scale was not looked at.",
    )
    layer = MirasLayer

    memory: Literal["perceptron", "matrix"] = param("perceptron", "what learns")
    loss: BiasName = param("l2", "attentional bias: what it is asked to make small")
    keep: RetentionName = param("decay", "retention gate: how its weights follow from what is added up")
    learning: Literal["gradient", "momentum"] = param("gradient", "learning rule")
    p: float = param(3.0, "power of the loss lp", ge=1)
    q: float = param(4.0, "power of the retention q-norm", ge=1)
    mass: float = param(1.0, "sum of each output's weights with the retention kl", gt=0)
    by_block: bool = param(False, "whether queries are answered with the weights at the beginning of their block")

    def network(self) -> Perceptron:
        depth = 1 if self.memory == "matrix" else self.depth
        return Perceptron(depth=depth, expand=self.expand, residual=self.residual and self.memory != "matrix")

    def bias(self) -> Bias:
        return Bias(self.loss, self.p)

    def retention(self) -> Retention:
        return Retention(self.keep, self.q, self.mass)

    def gates(self) -> tuple[str, ...]:
        return (*super().gates(), "momentum") if self.learning == "momentum" else super().gates()
