"""Models of equal size that differ in their mixers."""

from __future__ import annotations

import pytest

from vestige.errors import SpecError
from vestige.evidence.equal import of_size, parameters_of
from vestige.layers.mixers.base import Mixer
from vestige.models.blocks import names_of
from vestige.models.config import VestigeConfig
from vestige.models.lm import VestigeLM

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 256}


def test_parameters_are_those_of_the_model():
    config = VestigeConfig(blocks="gla softmax", **SIZES)
    assert parameters_of(config) == VestigeLM(config).num_parameters()


@pytest.mark.parametrize("name", names_of(Mixer))
def test_the_channel_mixers_give_what_the_mixer_takes(name):
    wanted = parameters_of(VestigeConfig(blocks="softmax*2", intermediate_size=256, **SIZES))
    config = of_size(wanted, blocks=f"{name} softmax", **SIZES)
    assert abs(parameters_of(config) - wanted) <= 3 * SIZES["hidden_size"]  # half a channel of two channel mixers


def test_what_cannot_be_so_small_is_refused():
    with pytest.raises(SpecError, match="parameters is 1000"):
        of_size(1000, blocks="softmax", **SIZES)
    with pytest.raises(SpecError, match="beside its channel mixers"):
        of_size(10**6, blocks="softmax", channel="none", **SIZES)
