"""What the checks of erasers share: small models and examples, and a classifier of digits that is to forget one."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from vestige.evidence.certify.suite import Case
from vestige.evidence.references import reference_of
from vestige.models.tiny import VOCABULARY, tiny_model
from vestige.weights.erase.eraser import Eraser, Trace
from vestige.weights.erase.retrain import Retrain

__all__ = ["Digits", "EraserCase", "Problem", "digits", "untrained"]

FORGOTTEN = 3
"""The digit that is to be forgotten."""


@dataclass(frozen=True)
class Problem:
    """A small model and what it is to forget and to keep."""

    model: Any
    forget: Any
    retain: Any
    held_out: Any

    def sets(self) -> dict[str, Any]:
        """The sets as an eraser takes them."""
        return {"forget": self.forget, "retain": self.retain, "held_out": self.held_out}


@dataclass
class EraserCase(Case):
    """An eraser, and the small models that it is tried on."""

    method: Any

    @functools.cached_property
    def fitted(self) -> Any:
        """The method with hyper-parameters with which small models forget in seconds."""
        return self.method.replace(**getattr(reference_of(self.method.name), "SMALL", {}))

    def problem(self, kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
        """Four rows to forget, six to keep, three held out, for a ``"classifier"`` or a ``"language model"``."""
        draw = torch.Generator().manual_seed(seed)
        if kind == "classifier":
            images = torch.randn(13, 1, 16, 16, generator=draw).to(dtype)
            labels = torch.randint(0, 5, (13,), generator=draw).tolist()
            rows: list[Any] = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
            model = tiny_model("vit", dtype, self.device)
        else:
            lengths = torch.randint(5, 12, (13,), generator=draw).tolist()
            rows = [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=draw)} for n in lengths]
            model = tiny_model("llama", dtype, self.device)
        return Problem(_whole(model), rows[:4], rows[4:10], rows[10:])

    def erase(self, problem: Problem, method: Eraser | None = None, **options: Any) -> Trace:
        """Let the method, or another, erase."""
        method = self.fitted if method is None else method
        if isinstance(method, Retrain):
            options.setdefault("start", lambda: _again(problem.model))
        return method.erase(problem.model, **{**problem.sets(), **options})


def _again(model: Any) -> Any:
    """A model of the same shapes, drawn anew."""
    return _whole(type(model)(model.config).to(model.device, model.dtype))


def _whole(model: Any) -> Any:
    """A float64 model that is float64 throughout; others as they are.

    Rotary angles and RMS norms of transformers are float32 in any model. Processors and GPUs round these otherwise, and
    what is left of it in gradients that are nearly zero, Adam turns into steps: weights move by up to 2e-6.
    """
    if model.dtype != torch.float64:
        return model
    model = copy.deepcopy(model)
    for part in model.modules():
        if hasattr(part, "variance_epsilon"):
            part.forward = types.MethodType(_norm, part)
        elif hasattr(part, "inv_freq"):
            part.forward = types.MethodType(_angles, part)
    return model


def _norm(self: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def _angles(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    angles = torch.cat((angles, angles), -1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class Digits:
    """Handwritten digits, 8x8, from scikit-learn: a small vision transformer that knows them and is to forget one.

    Args:
        seed: of the split into training and test images, and of the training.
    """

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
        images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
        labels = torch.tensor(found.target)[order]
        gone = labels == FORGOTTEN
        training, middle, last = (slice(0, 1000), slice(1000, 1200), slice(1200, None))

        def rows(part: slice, which: Tensor) -> TensorDataset:
            return TensorDataset(images[part][which[part]], labels[part][which[part]])

        self.seed = seed
        self.forget, self.retain, self.held_out = rows(training, gone), rows(training, ~gone), rows(middle, ~gone)
        self.forgotten_test, self.kept_test = rows(last, gone), rows(last, ~gone)

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """Of a model trained on all digits."""
        both = TensorDataset(*(torch.cat(pair) for pair in zip(self.forget.tensors, self.retain.tensors, strict=True)))
        return _trained(both, self.seed)

    @functools.cached_property
    def weights_without(self) -> dict[str, Tensor]:
        """Of a model trained alike, without the digit."""
        return _trained(self.retain, self.seed)

    def model(self, without: bool = False) -> Any:
        """The trained model, or the one that never saw the digit."""
        model = untrained()
        model.load_state_dict(self.weights_without if without else self.weights)
        return model.eval()

    @torch.no_grad()
    def accuracies(self, model: Any) -> tuple[float, float]:
        """On test images of the digit to forget, and of the others."""
        found = []
        for images, labels in (self.forgotten_test.tensors, self.kept_test.tensors):
            found.append((model(pixel_values=images).logits.argmax(1) == labels).float().mean().item())
        return found[0], found[1]


@functools.lru_cache(maxsize=8)
def digits(seed: int) -> Digits:
    """The digits of a seed; models are trained once."""
    return Digits(seed)


def untrained() -> Any:
    """A small vision transformer for digits."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
    return ViTForImageClassification(config)


def _trained(rows: TensorDataset, seed: int, epochs: int = 12, size: int = 50) -> dict[str, Tensor]:
    with seeded(seed):
        model = untrained().train()
    images, labels = rows.tensors
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=draw).split(size):
            loss = F.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed inside the block, and those of before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
