"""Models that differ in their mixers and not in their size."""

from __future__ import annotations

from typing import Any

import torch

from vestige.errors import SpecError
from vestige.models.config import VestigeConfig

__all__ = ["of_size", "parameters_of"]


def parameters_of(config: VestigeConfig) -> int:
    """Parameters of the model that a config describes; nothing is allocated."""
    from vestige.models.lm import VestigeLM

    with torch.device("meta"):
        return int(VestigeLM(config).num_parameters())


def of_size(parameters: int, **sizes: Any) -> VestigeConfig:
    """The config whose model comes nearest to a number of parameters: what a mixer takes, the channel mixers give.

    Args:
        parameters: how many are wanted.
        sizes: fields of a :class:`~vestige.models.config.VestigeConfig`, all but ``intermediate_size``.

    Raises:
        SpecError: without any channel mixer there would be more; the channel mixers do not take ``intermediate_size``.
    """
    least = parameters_of(VestigeConfig(**sizes, intermediate_size=1))
    unit = parameters_of(VestigeConfig(**sizes, intermediate_size=2)) - least  # the channel mixers are linear in it
    if least > parameters or unit < 1:
        raise SpecError(f"parameters is {parameters}; the model has {least} beside its channel mixers")
    return VestigeConfig(**sizes, intermediate_size=1 + round((parameters - least) / unit))
