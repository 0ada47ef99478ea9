"""Handwritten digits, 8 x 8, that scikit-learn brings along, and a vision transformer small enough to learn them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vestige.core.packages import need

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset
    from transformers import PreTrainedModel

__all__ = ["digits", "small_vit"]


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    need("the digits", "weights", "sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


def digits(seed: int, train: int = 600, test: int = 400) -> tuple[TensorDataset, TensorDataset]:
    """Rows to train on and others to ask: images (1, 8, 8) from 0 to 1, and labels 0 to 9.

    Args:
        seed: chooses the rows.
        train, test: how many; 1797 together at most.
    """
    from torch.utils.data import TensorDataset

    images, labels = _images()
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = order[:train], order[train : train + test]
    return tuple(TensorDataset(images[rows], labels[rows]) for rows in parts)  # type: ignore[return-value]


def small_vit(seed: int, **changes: Any) -> PreTrainedModel:
    """A ViT of two layers for the digits, randomly initialised; ``changes`` are fields of its config."""
    from transformers import ViTConfig, ViTForImageClassification

    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**{**images, **sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)
