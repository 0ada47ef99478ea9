"""OmegaNet: the Omega rule by plain gradient descent."""

from __future__ import annotations

from vestige.core.method import Paper, Verdict
from vestige.layers.mixers.atlas import AtlasLayer, OmegaMixer

__all__ = ["OmegaNet", "OmegaNetLayer"]


class OmegaNetLayer(AtlasLayer):
    """The layer of :class:`OmegaNet`. It holds no ``surprise``."""


class OmegaNet(OmegaMixer):
    """Learn the last few tokens at each token, over polynomial features of keys: what is memorised is a context, not
    single tokens.

    Each token says how much it counts while it is in the window. Atlas without momentum and without Muon.
    """

    name = "omega-net"
    paper = Paper(
        title="ATLAS: Learning to Optimally Memorize the Context at Test Time",
        year=2025,
        arxiv="2505.23735",
        equations="sections 3.1 (features) and 3.2 (the Omega rule, OmegaNet); gates per head",
    )
    verdict = Verdict(
        "reproduced",
        "A window of eight leaves an error of 0.64 to 0.70, the newest token alone 0.72 to 0.76; products"
        " of two channels 0.37 to 0.45, channels 0.63 to 0.68 (3 seeds, untrained).",
    )
    layer = OmegaNetLayer
