"""Channel mixers: what happens to each token on its own, between the mixers of tokens."""

from __future__ import annotations

from vestige.layers.channels.base import Channel

__all__ = ["Channel"]
