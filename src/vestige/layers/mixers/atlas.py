"""Atlas: a memory that learns a window of the past at each token, with second-order steps on many features."""

from __future__ import annotations

from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.layers.mixers.learning import ConvolvedMixer, LearningLayer
from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.engine import Rule
from vestige.layers.ops.learning.steps import FeatureName
from vestige.layers.place import Place

__all__ = ["Atlas", "AtlasLayer", "OmegaMixer"]


class AtlasLayer(LearningLayer):
    """The layer of :class:`Atlas` and of its kin."""


class OmegaMixer(ConvolvedMixer):
    """Base of the mixers that learn by the Omega rule: at each token from the whole window, and from features."""

    expand: int = param(1, "width between the memory's layers over that of a head", ge=1)
    window: int = param(4, "the last tokens that each token learns anew", ge=1)
    feature: FeatureName = param("polynomial", "what the memory sees of keys and queries")
    degree: int = param(2, "the most channels that a feature multiplies", ge=1)

    def check_place(self, place: Place) -> None:
        super().check_place(place)
        if self.window > place.context:
            raise SpecError(
                f"{self.name}: window = {self.window} is longer than the context of {place.context} tokens that the "
                f"model is made for (max_position_embeddings)"
            )

    def bias(self) -> Bias:
        """What the memory is asked to make small."""
        return Bias()

    def rule(self) -> Rule:
        return Rule(
            memory=self.network(),
            bias=self.bias(),
            refresh=self.refresh,
            window=self.window,
            muon=getattr(self, "muon", 0),
            by_block=getattr(self, "by_block", False),
            feature=self.feature,
            degree=self.degree,
        )


class Atlas(OmegaMixer):
    """Learn not the newest token but the last few, over polynomial features of keys, by steps as large in every
    direction (Muon).

    With ``by_block`` the step is taken once per block, at its end, and queries are answered with the weights before.
    """

    name = "atlas"
    paper = Paper(
        title="ATLAS: Learning to Optimally Memorize the Context at Test Time",
        year=2025,
        arxiv="2505.23735",
        equations="sections 3.1 (features), 3.2 (the Omega rule), 4.2 (Muon); signs as in appendix D; gates per head",
    )
    verdict = Verdict(
        "reproduced",
        "Where all keys share a direction, Muon leaves an error of 0.69 to 0.71, plain steps 0.92 to 1.02"
        " (3 seeds, untrained). In the paper's own ablation the language model is better without Muon; "
        "that was not looked at.",
    )
    layer = AtlasLayer

    muon: int = param(5, "iterations that make a step as large in every direction; 0: a plain step", ge=0)
    step: float = param(0.1, "the most that a step counts; its singular values are near one", gt=0)
    by_block: bool = param(False, "whether a step is taken per block, and queries answered with the weights before")

    def gates(self) -> tuple[str, ...]:
        return ("decay", "rate", "momentum", "step")
