"""What the scripts of this folder share: pictures, and what all benchmarks share."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.evidence.data.digits import digits, small_vit
from vestige.evidence.data.fashion import fashion

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, Sheet, here, keep, known, short

__all__ = [
    "CLASSES",
    "Clock",
    "Pictures",
    "Sheet",
    "forms_of",
    "here",
    "keep",
    "known",
    "label",
    "made_room",
    "names",
    "options",
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


def forms_of(
    family: type[Method], forms: dict[str, list[dict[str, Any]]], only: list[str] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """The methods of a family, each as it is and in further forms; those named in ``forms`` first, in its order.

    With ``only`` those of these names or labels, in that order; ``name()`` is a method as it is.
    """
    known = names(family)
    order = [name for name in forms if name in known] + [name for name in known if name not in forms]
    found = [(name, changes) for name in order for changes in ({}, *forms.get(name, ()))]
    if only is None:
        return found
    return [
        form for wanted in only for form in found if wanted in (form[0], label(*form) if form[1] else f"{form[0]}()")
    ]


def label(name: str, changes: dict[str, Any]) -> str:
    """A form of a method in tables."""
    return " ".join([name, *(f"{key}={value}" for key, value in changes.items())])


def made_room(device: str) -> None:
    """Give back what memory of a GPU is held for nothing, which others may share."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def options(about: str | None) -> argparse.ArgumentParser:
    """The options that scripts have in common."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: a file beside this script, which is gone on with")
    parser.add_argument("--only", nargs="+", help="names of methods, or of their forms; default: all")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many; another call goes on")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small models do not gain from more")
    return parser
