"""Models of a run: those that there are, small new ones, and how they are taught."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vestige.core.method import did_you_mean
from vestige.errors import ModelError, SpecError, TrainingError
from vestige.evidence.runs.sources import Examples, Row
from vestige.evidence.runs.spec import Learning, Model
from vestige.training.quiet import without_bars
from vestige.weights.erase.examples import Examples as Rows
from vestige.weights.erase.examples import Reader
from vestige.weights.erase.losses import row_losses

__all__ = ["build", "load_from", "teach", "tokenizer_of"]

VIT = {"patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a language model: its own, or bytes for a new one."""
    if model.load is None:
        from vestige.training.text import make_tokenizer

        return make_tokenizer("bytes", [])
    from vestige.models.hub import load

    return load(model.load)[1]


def build(model: Model, found: Examples, tokenizer: Any) -> Any:
    """The model that a description names.

    Raises:
        SpecError: an unknown size, or sizes that do not fit one another.
        ModelError: it cannot be loaded.
    """
    if model.load is not None:
        return load_from(model.load, found.kind)
    if found.kind == "images":
        from transformers import ViTConfig, ViTForImageClassification

        channels, height, width = found.train[0]["pixel_values"].shape
        shape = {"image_size": (height, width), "num_channels": channels, "num_labels": found.classes}
        return _new(ViTConfig, ViTForImageClassification, {**VIT, **shape}, model)
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    shape = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **special}
    return _new(LlamaConfig, LlamaForCausalLM, {**LLAMA, **shape}, model)


def _new(config: Any, kind: Any, sizes: dict[str, Any], model: Model) -> Any:
    known = [name for name in vars(config()) if not name.startswith("_")]
    for name in model.new or {}:
        if name not in known:
            raise SpecError(f"field 'model.new': unknown field {name!r}; {did_you_mean(name, known)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        try:
            return kind(config(**{**sizes, **(model.new or {})})).eval()
        except (ValueError, TypeError, RuntimeError) as error:
            raise SpecError(f"field 'model.new': {str(error).splitlines()[0]}") from error


def load_from(place: str | Path, kind: str) -> Any:
    """A model from a folder or the Hugging Face Hub.

    Raises:
        ModelError: there is none, or it is of another kind.
    """
    with without_bars():
        if kind == "text":
            from vestige.models.hub import load

            return load(place)[0].eval()
        from transformers import AutoModelForImageClassification

        try:
            return AutoModelForImageClassification.from_pretrained(place).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"no image classifier {str(place)!r}: {str(error).splitlines()[0]}") from error


def teach(model: Any, rows: list[Row], how: Learning, tell: Callable[[int, float], None] = lambda *_: None) -> None:
    """Teach a model rows, in place.

    Args:
        model: with logits among its outputs.
        rows: what the model takes, with ``labels``.
        how: see :class:`~vestige.evidence.runs.spec.Learning`.
        tell: told the number of passes made and the mean loss of the last.

    Raises:
        TrainingError: a loss is not finite.
    """
    reader = Reader.of(model, None)
    examples = Rows(rows, "examples", reader)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.01)
    steps = how.epochs * math.ceil(len(rows) / how.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model.train()
        for epoch in range(how.epochs):
            total = 0.0
            for places, batch in examples.batches(how.batch, device, draw):
                given = {key: value for key, value in batch.items() if key != "labels"}
                loss = row_losses(model(**given).logits, batch["labels"], reader.causal).mean()
                if not bool(loss.isfinite()):
                    raise TrainingError(f"the loss is {float(loss)} in pass {epoch + 1} over the examples")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(places)
            tell(epoch + 1, total / len(rows))
    optimizer.zero_grad(set_to_none=True)
    model.eval()
