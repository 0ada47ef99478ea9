"""Every registered learner on a stream, beside fine-tuning and training on everything.

    python benchmarks/weights/retain.py --stream digits
    python benchmarks/weights/retain.py --stream fashion-mnist
    python benchmarks/weights/retain.py --stream domains --device cuda      # speeches, Python source, dictionary
    python benchmarks/weights/retain.py --stream facts --device cuda        # elements and countries, asked for
    python benchmarks/weights/retain.py --stream domains-small              # the same, a small model of our own
    python benchmarks/weights/retain.py --stream facts-small

**Pictures.** Ten classes, two at a time, learnt by a small vision transformer; the experience is not known when it is
asked. The model comes with something: the pictures of the other collection, in ten classes of their own. What is left
of these is the general ability; they are also the general samples of learners that want some.

**Language.** SmolLM2 learns texts of one kind after the other, or one property of elements and countries after the
other; the general ability, and the general samples, are passages of a novel. A small model of bytes learns the same
properties of fewer of them, and fewer and shorter texts; it was taught such passages before. Scores are log-likelihoods
per token.

All learners begin with the same weights and take the same steps. Settings are the defaults, or round numbers beside
them; nothing was tuned. Results go beside this script, a row for each learner and seed; what is there is not run again,
so that an interrupted run goes on. A method that is added to the package appears by itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, Clock, Sheet, forms_of, here, label, made_room, options, pictures, resized, rows_of
from transformers import TrainingArguments

import vestige
from vestige.errors import VestigeError
from vestige.evidence.certify.weights_retain import quiet
from vestige.evidence.runs.models import teach
from vestige.evidence.runs.spec import Learning
from vestige.weights.retain import ContinualRun, ContinualTrainer, Learner, Stream

OTHER = {"digits": "fashion-mnist", "fashion-mnist": "digits"}
TRAINING: dict[str, dict[str, Any]] = {
    "digits": {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
    "fashion-mnist": {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
    "domains": {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 2e-4},
    "facts": {"num_train_epochs": 8, "per_device_train_batch_size": 16, "learning_rate": 2e-4},
    "domains-small": {"num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
    "facts-small": {"num_train_epochs": 30, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
}
BEFORE = Learning(epochs=5, learning_rate=3e-3, batch=32)
TEXT = {"train": 480, "test": 64, "general": 128, "held_out": 64, "subjects": 118}  # blocks of 256 tokens; subjects
SMALL = {"train": 240, "subjects": 40, "length": 128}  # of which the small model learns
# Forms of methods that are worth a row beside the one with its defaults; the order is that in which they are run.
FORMS: dict[str, list[dict[str, Any]]] = {
    "finetune": [],
    "joint": [],
    "replay": [{"size": 40}],
    "adaptive-svd": [],
    "rehearsal-free": [
        {"l2": 0.1, "prediction": 0},
        {"ewc": 100, "prediction": 0},
        {"feature": 1.0, "prediction": 0},
    ],
    "gere": [{"weight": 0}, {"weight": 1}],
    "coda-prompt": [{"components": 6}],
    "control-llm": [{"freeze_head": False}],
    "fpf": [{"bursts": 5}],
}
# Of language models the classes do not compete, and the Fisher information is measured on some rows.
LANGUAGE_FORMS: dict[str, list[dict[str, Any]]] = {
    "finetune": [],
    "joint": [],
    "replay": [{"ratio": 0.125}],  # as many as new ones: few stored rows are learnt by heart
    "control-llm": [],
    "rehearsal-free": [
        {"head": "softmax"},
        {"l2": 0.1, "prediction": 0, "head": "softmax"},
        {"ewc": 100, "prediction": 0, "head": "softmax", "fisher_rows": 64},
    ],
    "sefe": [],
    "adaptive-svd": [],
    "gere": [{"weight": 1}, {"weight": 0}],
    "fpf": [],
    "s3ft": [{"tokens": 16}],
}


@dataclass(frozen=True)
class Course:
    """What the learners of one seed have in common.

    Attributes:
        start: a new model, which every learner begins with.
        stream: what is to be learnt.
        samples, held_out: of what the model could do before, for learners and for the score.
        collator: puts rows together; ``None``: the usual.
        evaluated: rows together in a score.
        about: sizes, for the result.
    """

    start: Callable[[], Any]
    stream: Stream
    samples: Any
    held_out: Any
    collator: Any
    evaluated: int
    about: dict[str, Any]


def course(name: str, seed: int, device: str) -> Course:
    """The course of a stream and a seed."""
    return (on_pictures if name in OTHER else on_language)(name, seed, device)


def on_pictures(name: str, seed: int, device: str) -> Course:
    """The model that comes out of this knows the general pictures."""
    data, general = pictures(name, seed), pictures(OTHER[name], seed)
    model = data.model(seed, labels=2 * CLASSES)
    side = model.config.image_size
    samples, held_out = (resized(part, side, CLASSES) for part in (general.train, general.test))
    teach(model.to(device), rows_of(samples), BEFORE.model_copy(update={"seed": seed}))
    return Course(
        start=_again(model, lambda: data.model(seed, labels=2 * CLASSES).to(device)),
        stream=Stream.by_class(data.train, data.test, experiences=CLASSES // 2),
        samples=samples,
        held_out=held_out,
        collator=None,
        evaluated=500,
        about={"train": len(data.train), "test": len(data.test), "vit": data.sizes},
    )


def on_language(name: str, seed: int, device: str) -> Course:
    import language

    small = name.endswith("-small")
    sizes = {**TEXT, "length": language.LENGTH, **(SMALL if small else {})}
    known = language.new_small(device, seed) if small else language.smollm2(device)
    samples, held_out = language.general_text(known.tokenizer, seed, TEXT["general"], TEXT["held_out"])
    if name.startswith("domains"):
        stream = language.domains(known.tokenizer, seed, sizes["train"], sizes["test"], sizes["length"])
    else:
        stream = language.fact_stream(known.tokenizer, seed, sizes["subjects"])
    if small:
        teach(known.model, samples, BEFORE.model_copy(update={"seed": seed}))
    return Course(
        # One model is enough: what learners leave on it is nothing but other weights.
        start=_again(known.model, lambda: known.model),
        stream=stream,
        samples=samples,
        held_out=held_out,
        collator=known.collate,
        evaluated=16,
        about={"model": "bytes" if small else "smollm2", **sizes}
        | ({"weights": sum(p.numel() for p in known.model.parameters())} if small else {}),
    )


def _again(model: Any, make: Callable[[], Any]) -> Callable[[], Any]:
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def begin() -> Any:
        model = make()
        model.load_state_dict(start)
        return model

    return begin


def learnt(spec: dict[str, Any], given: Course, training: dict[str, Any], seed: int, device: str) -> ContinualRun:
    """One learner through the stream."""
    learner = Learner.from_spec(spec)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            bf16=device == "cuda" and given.collator is not None,
            per_device_eval_batch_size=given.evaluated,
            seed=seed,
            **training,
        )
        trainer = ContinualTrainer(
            given.start(),
            learner,
            args,
            collator=given.collator,
            general=given.samples if learner.needs_general else None,
            held_out=given.held_out,
        )
        return trainer.run(given.stream)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--stream", choices=sorted(TRAINING), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, training = Clock(args.minutes), TRAINING[args.stream]
    forms = forms_of(Learner, FORMS if args.stream in OTHER else LANGUAGE_FORMS, args.only)
    sheet = Sheet(args.out or Path(__file__).with_name(f"retain-{args.stream}.json"), here(args.device))
    for seed in args.seeds:
        wanted = [form for form in forms if not sheet.has(learner=label(*form), seed=seed)]
        if not wanted or clock.over:
            continue
        given = course(args.stream, seed, args.device)
        sheet.head |= {"stream": args.stream, **given.about, **training, "vestige": vestige.__version__}
        for name, changes in wanted:
            if clock.over:
                break
            row: dict[str, Any] = {"learner": label(name, changes), "seed": seed}
            made_room(args.device)
            at = time.perf_counter()
            try:
                run = learnt({"name": name, **changes}, given, training, seed, args.device)
            except VestigeError as error:
                row["left_out"] = str(error)
            except torch.OutOfMemoryError as error:  # others may hold it for now: another call tries again
                print(f"{row}: {error}", flush=True)
                continue
            else:
                kept = {"replay_bytes": run.replay_bytes, "state_bytes": run.state_bytes}
                row |= {**run.metrics(), **kept, "seconds": time.perf_counter() - at, "unit": run.unit}
                row |= {"names": list(run.names), "untrained": run.untrained.tolist()}
                row |= {"general": list(run.general), "matrix": run.matrix.tolist()}
            sheet.add(row)


if __name__ == "__main__":
    main()
