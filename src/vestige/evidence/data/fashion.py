"""Fashion-MNIST, pictures of clothes in ten classes, from Debian's package or a folder of the original files."""

from __future__ import annotations

import functools
import gzip
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vestige.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

__all__ = ["CLASSES", "fashion"]

CLASSES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLACE = Path("/usr/share/datasets/fashion-mnist")
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def fashion(seed: int, train: int = 5000, test: int = 1000) -> tuple[TensorDataset, TensorDataset]:
    """Rows to train on and others to ask: images (1, 28, 28) from 0 to 1, and labels 0 to 9.

    They are read from the folder in the environment variable ``FASHION_MNIST``, or where Debian puts them.

    Args:
        seed: chooses the rows.
        train: how many to train on; 60,000 at most.
        test: how many to ask; 10,000 at most.

    Raises:
        MissingPackageError: the files are absent.
        InputError: a file holds something else, or there are fewer rows than asked for.
    """
    from torch.utils.data import TensorDataset

    folder = Path(os.environ.get("FASHION_MNIST", PLACE))
    parts = []
    for part, count in (("train", train), ("test", test)):
        images, labels = _read(folder, part)
        if not 0 < count <= len(labels):
            raise InputError(f"parameter {part!r} is {count}; allowed: 1 to {len(labels)}")
        rows = np.random.default_rng(seed).permutation(len(labels))[:count]
        parts.append(TensorDataset(images[rows].float()[:, None] / 255, labels[rows].long()))
    return parts[0], parts[1]


@functools.lru_cache(maxsize=2)
def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """All images (rows, height, width) and labels (rows,) of a part, in 8 bits."""
    found = []
    for name in _FILES[part]:
        try:
            with gzip.open(folder / name) as file:
                found.append(_array(file.read(), folder / name))
        except FileNotFoundError:
            raise MissingPackageError(
                "dataset-fashion-mnist", "Fashion-MNIST", "apt-get install dataset-fashion-mnist"
            ) from None
        except (OSError, EOFError) as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from None
    images, labels = found
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(f"{folder} holds images of shape {tuple(images.shape)} and labels {tuple(labels.shape)}")
    return images, labels


def _array(held: bytes, name: Path) -> Tensor:
    """An IDX file: two zero bytes, the kind (8: bytes), the number of axes, their lengths, the values."""
    axes = held[3] if len(held) > 3 and held[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * axes
    sizes = np.frombuffer(held, ">u4", axes, 4).tolist() if len(held) >= start else []
    if not axes or len(held) != start + math.prod(sizes):
        raise InputError(f"{name} is no IDX file of bytes")
    return torch.from_numpy(np.frombuffer(held, np.uint8, offset=start).reshape(sizes).copy())
