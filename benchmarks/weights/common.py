"""What the scripts of this folder share: pictures, where and with what they ran, results that are taken up again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from vestige.core.files import write_whole
from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.evidence.data.digits import digits, small_vit
from vestige.evidence.data.fashion import fashion

__all__ = [
    "CLASSES",
    "Clock",
    "Pictures",
    "here",
    "keep",
    "known",
    "label",
    "names",
    "pictures",
    "resized",
    "rows_of",
    "short",
]

CLASSES = 10


@dataclass(frozen=True)
class Pictures:
    """Pictures of ten classes to learn, others to ask, and the sizes of a vision transformer that learns them."""

    train: TensorDataset
    test: TensorDataset
    sizes: dict[str, Any]

    def model(self, seed: int, labels: int = CLASSES) -> Any:
        """A new one."""
        return small_vit(seed, **self.sizes, num_labels=labels, initializer_range=0.1)


def pictures(name: str, seed: int) -> Pictures:
    """``digits`` (8 x 8, with scikit-learn) or ``fashion-mnist`` (28 x 28), some of them, drawn by the seed."""
    if name == "digits":
        return Pictures(*digits(seed, train=1000, test=400), {})
    sizes = {"image_size": 28, "patch_size": 7, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    return Pictures(*fashion(seed, train=2000, test=1000), sizes)


def resized(data: TensorDataset, side: int, first: int = 0) -> TensorDataset:
    """Pictures of another size; their labels begin with another number."""
    images, labels = data.tensors
    mode = "area" if images.shape[-1] >= side else "bilinear"
    return TensorDataset(F.interpolate(images, (side, side), mode=mode), labels + first)


def rows_of(data: TensorDataset) -> list[dict[str, Any]]:
    """Rows as models and audits take them."""
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(*data.tensors, strict=True)]


def names(family: type[Method]) -> list[str]:
    """The registered methods of a family."""
    return [card.name for card in registry.cards("weights") if issubclass(registry.load(card.name), family)]


def label(name: str, changes: dict[str, Any]) -> str:
    """A form of a method in tables."""
    return " ".join([name, *(f"{key}={value}" for key, value in changes.items())])


class Clock:
    """Says when the minutes that a script was given are over; what is done is kept, and another call goes on."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def here(device: str) -> dict[str, Any]:
    """Hardware and versions, for a result."""
    threads = f"{torch.get_num_threads()} CPU threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "packages": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def known(path: Path) -> list[dict[str, Any]]:
    """The rows of a result that was begun; none where there is none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def keep(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all: one row of ``rows`` a line."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    write_whole(path, f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def short(value: Any) -> Any:
    """Numbers with four digits, for files that people read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    return [short(each) for each in value] if isinstance(value, list) else value
