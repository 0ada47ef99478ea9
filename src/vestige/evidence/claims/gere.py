"""The claim of GeRe: held activations on general samples keep what the model could do before."""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase, quiet
from vestige.evidence.claims import claim
from vestige.evidence.data.digits import digits, small_vit
from vestige.weights.retain import ContinualRun, ContinualTrainer, Learner, Stream

GENERAL = (6, 7, 8, 9)
"""Digits that the model knows beforehand; half of their training rows are the general samples."""
SMALL = 1.0
"""Weight of the margin: with the method's 100, meant for large models, a small one learns nothing new."""


def of(rows: TensorDataset, classes: tuple[int, ...], part: slice = slice(None)) -> TensorDataset:
    """The rows of some digits."""
    images, labels = rows.tensors
    chosen = sum((labels == c for c in classes[1:]), labels == classes[0]).nonzero().flatten()[part]
    return TensorDataset(images[chosen], labels[chosen])


def after_six_digits(case: LearnerCase, learner: Learner, seed: int) -> ContinualRun:
    """A model that knows four digits learns six others, two at a time; the four are looked at on unseen images."""
    train, test = digits(seed)
    model = small_vit(seed).to(case.device)
    known = of(train, GENERAL)
    options: dict[str, Any] = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 240, "seed": seed}
    with quiet():
        first = case.args(num_train_epochs=20, learning_rate=3e-3, **options)
        ContinualTrainer(model, "finetune", first).run(Stream.of([(known, of(test, GENERAL))]))
        stream = Stream.by_class(of(train, tuple(range(6))), of(test, tuple(range(6))), experiences=3)
        args = case.args(num_train_epochs=6, learning_rate=3e-3, **options)
        general = of(train, GENERAL, slice(None, None, 2))
        held_out = of(test, GENERAL)
        return ContinualTrainer(model, learner, args, general=general, held_out=held_out).run(stream)


@claim(slow=True)
def what_was_known_before_stays(case: LearnerCase) -> Seen:
    """Accuracy on unseen images of digits known before falls less than with fine-tuning, and new ones are learnt."""
    seen: dict[str, list[float]] = {n: [] for n in ("kept", "kept by finetune", "labels alone", "learnt")}
    for seed in case.seeds:
        mine = after_six_digits(case, case.method.replace(weight=SMALL), seed)
        plain = after_six_digits(case, Learner.from_spec("finetune"), seed)
        labels = after_six_digits(case, case.method.replace(weight=0.0), seed)
        values = (mine.general[-1], plain.general[-1], labels.general[-1], mine.plasticity)
        for name, value in zip(seen, values, strict=True):
            seen[name].append(value)
    for n in range(len(case.seeds)):
        expect(seen["kept"][n] > seen["kept by finetune"][n] + 0.2, f"no more is kept: {seen}")
        expect(seen["learnt"][n] > 0.5, f"new digits are not learnt: {seen}")
    return seen
