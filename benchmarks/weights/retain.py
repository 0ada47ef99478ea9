"""Every registered learner on a class-incremental stream of pictures, beside fine-tuning and training on everything.

    python benchmarks/weights/retain.py --stream digits
    python benchmarks/weights/retain.py --stream fashion-mnist

Ten classes, two at a time, learnt by a small vision transformer; the experience is not known when it is asked. The
model comes with something: the pictures of the other collection, in ten classes of their own. What is left of these is
the general ability; they are also the general samples of learners that want some. All learners begin with the same
weights and take the same steps. Settings are the defaults, or round numbers beside them; nothing was tuned.

Results go beside this script, a row for each learner and seed; what is there is not run again, so that an interrupted
run goes on (``--minutes`` ends one in time). A method that is added to the package appears by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, Clock, Pictures, here, keep, known, label, names, pictures, resized, rows_of, short
from transformers import TrainingArguments

import vestige
from vestige.errors import VestigeError
from vestige.evidence.certify.weights_retain import quiet
from vestige.evidence.runs.models import teach
from vestige.evidence.runs.spec import Learning
from vestige.weights.retain import ContinualTrainer, Learner, Stream

OTHER = {"digits": "fashion-mnist", "fashion-mnist": "digits"}
TRAINING = {
    "digits": {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
    "fashion-mnist": {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 2e-3},
}
BEFORE = Learning(epochs=5, learning_rate=3e-3, batch=32)
# Forms of methods that are worth a row beside the one with its defaults.
FORMS: dict[str, list[dict[str, Any]]] = {
    "rehearsal-free": [
        {"l2": 0.1, "prediction": 0},
        {"ewc": 100, "prediction": 0},
        {"feature": 1.0, "prediction": 0},
    ],
    "replay": [{"size": 40}],
    "gere": [{"weight": 0}, {"weight": 1}],
    "coda-prompt": [{"components": 6}],
    "control-llm": [{"freeze_head": False}],
}


def began(data: Pictures, general: Pictures, seed: int) -> Any:
    """The model that every learner of a seed begins with: it knows the general pictures."""
    model = data.model(seed, labels=2 * CLASSES)
    side = model.config.image_size
    teach(model, rows_of(resized(general.train, side, CLASSES)), BEFORE.model_copy(update={"seed": seed}))
    return model


def learnt(spec: dict[str, Any], model: Any, data: Pictures, general: Pictures, stream: str, seed: int) -> Any:
    """One learner through the stream."""
    learner = Learner.from_spec(spec)
    side = model.config.image_size
    experiences = Stream.by_class(data.train, data.test, experiences=CLASSES // 2)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = TrainingArguments(
            output_dir=folder,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            per_device_eval_batch_size=500,
            seed=seed,
            **TRAINING[stream],
        )
        trainer = ContinualTrainer(
            model,
            learner,
            args,
            general=resized(general.train, side, CLASSES) if learner.needs_general else None,
            held_out=resized(general.test, side, CLASSES),
        )
        return trainer.run(experiences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=sorted(OTHER), required=True)
    parser.add_argument("--out", type=Path, help="default: retain-STREAM.json beside this script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names; default: every registered learner")
    parser.add_argument("--forms", type=json.loads, default=FORMS, help="JSON, in place of the forms in this script")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=1, help="models are too small to gain from more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or Path(__file__).with_name(f"retain-{args.stream}.json")
    rows, clock = known(out), Clock(args.minutes)
    done = {(row["learner"], row["seed"]) for row in rows}
    forms = [
        (name, changes)
        for name in names(Learner)
        if not args.only or name in args.only
        for changes in ({}, *args.forms.get(name, ()))
    ]
    for seed in args.seeds:
        wanted = [form for form in forms if (label(*form), seed) not in done]
        if not wanted or clock.over:
            continue
        data, general = pictures(args.stream, seed), pictures(OTHER[args.stream], seed)
        model = began(data, general, seed)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for name, changes in wanted:
            if clock.over:
                break
            row: dict[str, Any] = {"learner": label(name, changes), "seed": seed}
            fresh = data.model(seed, labels=2 * CLASSES)
            fresh.load_state_dict(start)
            at = time.perf_counter()
            try:
                run = learnt({"name": name, **changes}, fresh, data, general, args.stream, seed)
            except VestigeError as error:
                row["left_out"] = str(error)
            else:
                kept = {"replay_bytes": run.replay_bytes, "state_bytes": run.state_bytes}
                row |= {**run.metrics(), **kept, "seconds": time.perf_counter() - at, "matrix": run.matrix.tolist()}
            rows.append(short(row))
            shown = {key: value for key, value in rows[-1].items() if key != "matrix"}
            print(json.dumps(shown), flush=True)
            sizes = {"train": len(data.train), "test": len(data.test), "vit": data.sizes}
            settings = {"stream": args.stream, **sizes, **TRAINING[args.stream], "vestige": vestige.__version__}
            keep(out, {**here("cpu"), **settings, "rows": rows})


if __name__ == "__main__":
    main()
