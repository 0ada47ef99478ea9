"""The claim of CODA-Prompt: on a pretrained encoder that stands still, prompts learn and little is forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase, quiet
from vestige.evidence.claims import claim
from vestige.evidence.data.digits import digits, small_vit
from vestige.weights.retain import ContinualRun, ContinualTrainer, Learner, Stream

TURNS = (1, 2, 3)
"""Quarters of a turn: what the encoder has learnt to tell apart are digits that lie on their sides and heads."""
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


def turned(rows: TensorDataset) -> TensorDataset:
    """Every row in three turns; a digit in another turn is another class. (Some look alike on their heads: 0, 1, 8.)"""
    images, labels = rows.tensors
    return TensorDataset(
        torch.cat([images.rot90(turn, (2, 3)) for turn in TURNS]),
        torch.cat([labels + 10 * place for place in range(len(TURNS))]),
    )


def encoder(case: LearnerCase, seed: int) -> nn.Module:
    """A vision transformer that has learnt turned digits."""
    model = small_vit(seed, num_labels=10 * len(TURNS), **SIZES).to(case.device)
    options: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 400,
        "learning_rate": 2e-3,
    }
    args = case.args(num_train_epochs=12, seed=seed, **options)
    stream = Stream.of([tuple(turned(rows) for rows in digits(seed))])  # type: ignore[list-item]
    with quiet():
        ContinualTrainer(model, "finetune", args).run(stream)
    return model.vit  # type: ignore[return-value]


def upright(case: LearnerCase, learner: Learner, seed: int, known: nn.Module) -> ContinualRun:
    """Six upright digits, two at a time, learnt on the encoder."""
    model = small_vit(seed, **SIZES).to(case.device)
    model.vit.load_state_dict(known.state_dict())  # type: ignore[union-attr]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 240,
        "learning_rate": 3e-3,
    }
    return case.learn(learner, model, case.stream(seed, rows=240), case.args(num_train_epochs=16, seed=seed, **options))


@claim(slow=True)
def prompts_on_a_still_encoder_keep_what_was_learnt(case: LearnerCase) -> Seen:
    """Accuracy over six digits ends far above fine-tuning's, which begins with the same encoder, and each is learnt."""
    seen: dict[str, list[float]] = {name: [] for name in ("average", "of finetune", "learnt", "forgotten")}
    for seed in case.seeds:
        known = encoder(case, seed)
        mine, plain = (upright(case, each, seed, known) for each in (case.method, Learner.from_spec("finetune")))
        values = (mine.average, plain.average, mine.plasticity, mine.forgetting)
        for name, value in zip(seen, values, strict=True):
            seen[name].append(value)
    for n in range(len(case.seeds)):
        expect(seen["average"][n] > seen["of finetune"][n] + 0.2, f"no more is kept: {seen}")
        expect(seen["learnt"][n] > 0.7, f"new digits are not learnt: {seen}")
    return seen
