"""A small labelled problem and a small vision transformer, for tests of learners."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from vestige.weights.retain import ContinualTrainer, Stream


def blobs(rows: int = 48, classes: int = 6, seed: int = 0) -> TensorDataset:
    """Images (rows, 1, 8, 8) of ``classes`` noisy patterns, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return TensorDataset(patterns[labels] + 0.3 * torch.randn(rows, 1, 8, 8, generator=draw), labels)


def vit(seed: int = 0, labels: int = 6, **changes: Any) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=labels, **{**sizes, **changes})
    return ViTForImageClassification(config)


def stream(**options: Any) -> Stream:
    return Stream.by_class(blobs(), blobs(30, seed=1), **{"experiences": 3, **options})


def arguments(folder: Any = "unused", **options: Any) -> TrainingArguments:
    plain = {
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**plain, **options})


def learn(learner: Any, model: Any = None, on: Stream | None = None, args: Any = None, **options: Any) -> Any:
    """Run a learner on the small problem; the run, and the model."""
    model = vit() if model is None else model
    trainer = ContinualTrainer(model, learner, args or arguments(), **options)
    return trainer.run(stream() if on is None else on), model
