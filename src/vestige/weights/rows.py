"""What learners and erasers ask of datasets and of the labels in them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vestige.errors import InputError, UnsupportedModelError

__all__ = ["IGNORED", "accepted", "by_number", "label_count", "logits_of", "predicts_tokens", "within"]


IGNORED = -100
"""The label of tokens that do not count, as in transformers."""


def accepted(model: nn.Module) -> frozenset[str] | None:
    """The columns of a row that a model takes, ``labels`` among them; ``None`` where its forward does not name any."""
    asked = getattr(model, "get_base_model", None)  # of PEFT, whose own forward takes everything
    base = asked() if callable(asked) else model
    kinds = inspect.signature(base.forward).parameters.values()
    names = {each.name for each in kinds if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return frozenset(names | {"labels", "label"}) if names else None


def by_number(source: Any, name: str) -> Any:
    """The dataset itself, if its rows can be asked for by number.

    Raises:
        InputError: it is a loader, a stream without length, or no dataset at all.
    """
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, Mapping | str):
        raise InputError(f"{name} is a {type(source).__name__}; allowed: a dataset with a length and rows by number")
    return source


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model predicts next tokens."""
    asked = getattr(model, "can_generate", None)
    return bool(asked()) if callable(asked) else False


def label_count(model: nn.Module) -> int | None:
    """How many labels (of a language model: tokens) a model knows; ``None`` where it does not say."""
    tokens = predicts_tokens(model) or type(model).__name__.endswith("ForMaskedLM")
    return getattr(getattr(model, "config", None), "vocab_size" if tokens else "num_labels", None)


def within(numbers: Tensor, count: int | None, where: str, what: str) -> None:
    """Refuse labels or tokens that are not from 0 to below a count (``None``: any).

    Raises:
        InputError: one is out of range.
    """
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or (count is not None and high >= count):
        most = "" if count is None else f" to {count - 1}"
        raise InputError(f"{where}: {what} {low if low < 0 else high} is out of range; allowed: 0{most}")


def logits_of(outputs: Any, model: nn.Module) -> Tensor:
    """The logits of a model's outputs.

    Raises:
        UnsupportedModelError: there are none, as the model has no output layer.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits; allowed: a model with an output layer, such as "
            "...ForImageClassification or ...ForCausalLM"
        )
    return logits
