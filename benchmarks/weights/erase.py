"""Every registered eraser on pictures, beside a model that was trained again without them.

    python benchmarks/weights/erase.py --data digits
    python benchmarks/weights/erase.py --data fashion-mnist

A small vision transformer learns ten classes; then it is to forget one of them (class 3), or a hundred rows drawn at
random. Each result is audited as a user would (``vestige.evidence.audit_erasure``): accuracy on what was to be
forgotten, kept and never seen, membership inference, relearning, probes, four bits; the same of the model before and of
the one trained again. Erasers run with the settings that their certificates use on small models.

Results go beside this script, a row for each task, eraser and seed; what is there is not run again, so that an
interrupted run goes on (``--minutes`` ends one in time). A method that is added to the package appears by itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Clock, Pictures, here, keep, known, label, names, pictures, rows_of, short
from torch import Tensor
from torch.utils.data import TensorDataset

import vestige
from vestige.errors import VestigeError
from vestige.evidence.certify.erasing import EraserCase
from vestige.evidence.erasure import Relearning, audit_erasure
from vestige.evidence.runs.models import teach
from vestige.evidence.runs.spec import Learning
from vestige.weights.erase.eraser import Eraser

CLASS, ROWS = 3, 100
TASKS = ("class", "random")
TEACHING = {
    "digits": Learning(epochs=12, learning_rate=3e-3, batch=50),
    "fashion-mnist": Learning(epochs=12, learning_rate=2e-3, batch=50),
}
RELEARNING = Relearning(learning_rate=1e-3, steps=20)
ERASED = "erased"
LOOKED_AT = 300  # rows of a set, at most
# Forms of methods that are worth a row beside the one with the settings of the certificate.
FORMS: dict[str, list[dict[str, Any]]] = {"ssd": [{"estimator": "per-example"}]}


@dataclass(frozen=True)
class Task:
    """What is to be forgotten and kept; what nothing was taught of: of the same kind, and the rest."""

    forget: TensorDataset
    retain: TensorDataset
    unseen: TensorDataset
    others: TensorDataset

    @classmethod
    def of(cls, name: str, data: Pictures, seed: int) -> Task:
        (images, labels), (_, asked) = data.train.tensors, data.test.tensors
        if name == "class":
            gone, alike = labels == CLASS, asked == CLASS
            return cls(some(data.train, gone), some(data.train, ~gone), some(data.test, alike), some(data.test, ~alike))
        gone = torch.zeros(len(images), dtype=torch.bool)
        gone[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:ROWS]] = True
        return cls(some(data.train, gone), some(data.train, ~gone), data.test, data.test)


def some(data: TensorDataset, which: Tensor) -> TensorDataset:
    return TensorDataset(*(t[which] for t in data.tensors))


def taught(data: Pictures, rows: list[dict[str, Any]], how: Learning, seed: int) -> Any:
    model = data.model(seed)
    teach(model, rows, how.model_copy(update={"seed": seed}))
    return model


@torch.no_grad()
def accuracy(model: Any, data: TensorDataset) -> float:
    images, labels = data.tensors
    return float((model(pixel_values=images).logits.argmax(1) == labels).float().mean())


def told(model: Any, task: Task, seed: int) -> dict[str, float | None]:
    """What an audit says of a model, by measure."""
    sets = {name: rows_of(getattr(task, name)) for name in ("forget", "retain", "unseen")}
    audit = audit_erasure(model, **sets, relearning=RELEARNING, rows=LOOKED_AT, seed=seed)
    return {"unseen others accuracy": accuracy(model, task.others), **{m.name: m.value(ERASED) for m in audit.measures}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(TEACHING), required=True)
    parser.add_argument("--out", type=Path, help="default: erase-DATA.json beside this script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names; default: every registered eraser")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=1, help="models are too small to gain from more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or Path(__file__).with_name(f"erase-{args.data}.json")
    rows, clock, how = known(out), Clock(args.minutes), TEACHING[args.data]
    done = {(row["task"], row["eraser"], row["seed"]) for row in rows}
    forms = [
        (label(name, changes), name, changes)
        for name in names(Eraser)
        if name != "retrain" and (not args.only or name in args.only)  # the reference of all
        for changes in ({}, *FORMS.get(name, ()))
    ]
    for seed, task_name in [(seed, task) for seed in args.seeds for task in TASKS]:
        wanted = [form for form in forms if (task_name, form[0], seed) not in done]
        if not wanted or clock.over:
            continue
        data = pictures(args.data, seed)
        task = Task.of(task_name, data, seed)
        forget, retain = rows_of(task.forget), rows_of(task.retain)
        before = taught(data, [*forget, *retain], how, seed)
        retrained = taught(data, retain, how, seed)
        # Both are the same beside every eraser, so they are looked at once.
        beside = {"retrained": told(retrained, task, seed), "before": told(before, task, seed)}
        for form, name, changes in wanted:
            if clock.over:
                break
            row: dict[str, Any] = {"task": task_name, "eraser": form, "seed": seed}
            model = data.model(seed)
            model.load_state_dict(before.state_dict())
            model.eval()
            try:
                method = EraserCase(method=vestige.method(name)).fitted.replace(**changes)
                trace = method.erase(model, forget=forget, retain=retain, batch_size=how.batch, seed=seed)
            except VestigeError as error:
                row["left_out"] = str(error)
            else:
                row |= {"seconds": trace.seconds, "stopped": trace.stopped}
                found = {ERASED: told(model, task, seed), **beside}
                row["measures"] = {name: {who: f.get(name) for who, f in found.items()} for name in found[ERASED]}
            rows.append(short(row))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "measures"}), flush=True)
            sizes = {"train": len(data.train), "test": len(data.test), "vit": data.sizes}
            sizes |= {"class": CLASS, "random_rows": ROWS, **how.model_dump(exclude={"seed"})}
            settings = {"data": args.data, **sizes}
            keep(out, {**here("cpu"), **settings, "vestige": vestige.__version__, "rows": rows})


if __name__ == "__main__":
    main()
