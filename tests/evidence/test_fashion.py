"""Fashion-MNIST is read from the files that its package brings."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from vestige.errors import InputError, MissingPackageError
from vestige.evidence.data import fashion as module
from vestige.evidence.data.fashion import fashion


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    module._read.cache_clear()
    yield tmp_path
    module._read.cache_clear()


def write(folder, name, values):
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    (folder / name).write_bytes(gzip.compress(head + values.tobytes()))


def whole(folder, rows=30):
    images = np.random.default_rng(0).integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    for pair in module._FILES.values():
        write(folder, pair[0], images)
        write(folder, pair[1], (images[:, 0, 0] % 10).astype(np.uint8))
    return images


def test_rows_are_drawn_by_the_seed_and_scaled(folder):
    held = whole(folder)
    (train, test), (again, _), (other, _) = (fashion(seed, train=12, test=5) for seed in (1, 1, 2))
    images, labels = train.tensors
    assert images.shape == (12, 1, 28, 28) and images.dtype == torch.float32 and len(test) == 5
    assert torch.equal(images, again.tensors[0]) and not torch.equal(images, other.tensors[0])
    for image, label in zip(images, labels, strict=True):
        (place,) = np.flatnonzero((held == (image[0] * 255).round().byte().numpy()).all((1, 2)))
        assert int(label) == held[place, 0, 0] % 10


def test_what_is_absent_is_named_with_the_command_that_brings_it():
    with pytest.raises(MissingPackageError, match="apt-get install dataset-fashion-mnist"):
        fashion(0)


def test_broken_files_and_too_many_rows_are_refused(folder):
    whole(folder)
    with pytest.raises(InputError, match="1 to 30"):
        fashion(0, train=31)
    module._read.cache_clear()
    name = module._FILES["train"][0]
    (folder / name).write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0" * 9))
    with pytest.raises(InputError, match="IDX"):
        fashion(0, train=3)
    module._read.cache_clear()
    (folder / name).write_bytes(b"no gzip")
    with pytest.raises(InputError, match=name):
        fashion(0, train=3)
