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
    verdict = Verdict("not yet checked", "")
    layer = OmegaNetLayer
