"""DeepTransformers: linear attention with features of the exponential, into a deep memory."""

from __future__ import annotations

import math

from vestige.core.method import Paper, Verdict, param
from vestige.layers.mixers.atlas import AtlasLayer, OmegaMixer
from vestige.layers.ops.learning.biases import Bias

__all__ = ["DeepTransformers", "DeepTransformersLayer"]


class DeepTransformersLayer(AtlasLayer):
    """The layer of :class:`DeepTransformers`. It holds no ``surprise``."""


class DeepTransformers(OmegaMixer):
    """Hebb's rule on a deep memory that sees the features of softmax's exponential: attention whose past is a network.

    The paper's features are infinitely many, and its state all of the past; here they end at a degree, as Taylor's
    series does, and the state stays as large as it is. With ``depth=1`` it is linear attention with Taylor features.
    """

    name = "deep-transformers"
    paper = Paper(
        title="ATLAS: Learning to Optimally Memorize the Context at Test Time",
        year=2025,
        arxiv="2505.23735",
        equations="section 4.1 (deep linear attention, its windowed form, DeepTransformers), features to a degree",
    )
    verdict = Verdict(
        "not checkable here",
        "Infinitely many features would hold all of the past; here they end at a degree. Seen: of 32 "
        "pairs features to order 3 tell 0.78 to 0.91 apart, channels of the same width 0.38 to 0.66 (3 "
        "seeds, untrained).",
    )
    layer = DeepTransformersLayer

    window: int = param(1, "the last tokens that each token learns anew", ge=1)
    sharpness: float = param(4.0, "what the product of query and key is multiplied with in the exponent", gt=0)

    def scales(self, degree: int) -> list[float]:
        return [
            math.sqrt(math.exp(-self.sharpness) * self.sharpness**order / math.factorial(order))
            for order in range(degree + 1)
        ]

    def bias(self) -> Bias:
        return Bias("dot")
