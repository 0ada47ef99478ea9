"""Mixers: how a layer reads its past. One file per mixer; :mod:`vestige.layers.mixers.base` says how one is written."""

from __future__ import annotations

from vestige.layers.mixers.base import Mixer, MixerLayer
from vestige.layers.mixers.recurrent import RecurrentLayer, RecurrentMixer
from vestige.layers.place import Place

__all__ = ["Mixer", "MixerLayer", "Place", "RecurrentLayer", "RecurrentMixer"]
