"""What each learner adds to a step, beside plain fine-tuning.

    python benchmarks/weights/overhead.py                   # a CPU, one thread: overhead.json
    python benchmarks/weights/overhead.py --device cuda     # overhead-cuda.json
    python benchmarks/weights/overhead.py --device cuda --size base     # overhead-cuda-base.json

A vision transformer of 2.7 million weights on pictures of 50 patches, or one of the size of ViT-base (86 million, 196
patches, on a GPU in bfloat16 where autocast has it), batches of 32, Adam, through transformers' Trainer; steps of a
second experience, when every learner has something to keep. From the start of a step to its end; on a CPU in time of
the processor. Learner and fine-tuning take turns, five rounds of each: of every step the least over the rounds counts,
which other work on the machine disturbs least, and of these the mean over the steps, as some learners do more in every
fourth. Forward passes are counted: a regulariser that takes none more is to stay under a tenth.

What a learner does between experiences (Fisher information, decompositions, repairs) is not part of a step; the
ledger's column ``overhead`` is the share of the whole training time spent in a learner's hooks. Rows that are there are
not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Clock, Sheet, forms_of, here, label, options
from retain import FORMS
from torch.utils.data import TensorDataset
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from vestige.errors import VestigeError
from vestige.evidence.certify.weights_retain import quiet
from vestige.weights.retain import ContinualTrainer, Learner, Stream

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": 28,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 10,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "num_labels": 10,
    },
}
PLAIN = "finetune"
LEARNERS = {**FORMS, "sefe": [{"weight": 0}]}  # what its matrices add without its penalty


class Steps(TrainerCallback):
    """Times steps of the second experience, and counts forward passes."""

    def __init__(self, model: ViTForImageClassification, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.passes: list[int] = []
        self.experience, self.count = -1, 0
        model.vit.embeddings.register_forward_hook(self._counted)  # also of passes that are asked of the base alone

    def _counted(self, *_: Any) -> None:
        self.count += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.experience += 1

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count = 0
        self.began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.experience and state.global_step > 1:  # the first finds cold caches and an empty optimizer
            self.seconds.append(self._now() - self.began)
            self.passes.append(self.count)


def pictures(first: int, second: int, seed: int, sizes: dict[str, int]) -> TensorDataset:
    """Noise, so many rows of the first two classes and of the next two."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(first) % 2, 2 + torch.arange(second) % 2])
    shape = (len(labels), sizes["num_channels"], sizes["image_size"], sizes["image_size"])
    return TensorDataset(torch.rand(shape, generator=draw), labels)


def steps(spec: dict[str, Any], args: argparse.Namespace) -> Steps:
    """The steps of one learner."""
    torch.manual_seed(0)
    sizes = SIZES[args.size]
    model = ViTForImageClassification(ViTConfig(**sizes))
    learner = Learner.from_spec(spec)
    spy = Steps(model, args.device)
    with tempfile.TemporaryDirectory() as folder, quiet():
        training = TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            bf16=args.device == "cuda" and args.size == "base",
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-4,
        )
        general = pictures(args.batch, args.batch, 2, sizes) if learner.needs_general else None
        trainer = ContinualTrainer(model, learner, training, general=general, callbacks=[spy])
        data = pictures(args.batch, args.batch * args.steps, 0, sizes)
        trainer.run(Stream.by_class(data, pictures(4, 4, 1, sizes), experiences=2))
    return spy


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: 9; 21 on a GPU")
    args = parser.parse_args()
    args.steps = args.steps or (9 if args.device == "cpu" else 21)
    torch.set_num_threads(args.threads)
    clock = Clock(args.minutes)
    settings = {"vit": SIZES[args.size], "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    name = "-".join(["overhead", *(part for part in (args.device, args.size) if part not in ("cpu", "small"))])
    sheet = Sheet(args.out or Path(__file__).with_name(f"{name}.json"), {**here(args.device), **settings})
    for name, changes in forms_of(Learner, LEARNERS, args.only):
        row: dict[str, Any] = {"learner": label(name, changes)}
        if sheet.has(**row) or clock.over:
            continue
        rounds = []
        try:
            for _ in range(args.rounds):
                rounds.append((steps({"name": PLAIN}, args), steps({"name": name, **changes}, args)))
        except VestigeError as error:
            row["left_out"] = str(error)
        else:
            alone, mine = (_least([spy.seconds for spy in side]) for side in zip(*rounds, strict=True))
            row |= {"ms": 1e3 * mine, "finetune_ms": 1e3 * alone, "overhead": mine / alone - 1}
            row["forward_passes"] = statistics.mean(rounds[0][1].passes)
        sheet.add(row)


def _least(rounds: list[list[float]]) -> float:
    """The mean over steps of the least over rounds."""
    return statistics.fmean(min(step) for step in zip(*rounds, strict=True))


if __name__ == "__main__":
    main()
