"""Every registered eraser, beside a model that was trained again without what is to be forgotten.

    python benchmarks/weights/erase.py --data digits
    python benchmarks/weights/erase.py --data fashion-mnist
    python benchmarks/weights/erase.py --data facts --device cuda --tune       # settings, on a seed of their own
    python benchmarks/weights/erase.py --data facts --device cuda
    python benchmarks/weights/erase.py --data facts-small                      # likewise, with --tune before

**Pictures.** A small vision transformer learns ten classes; then it is to forget one of them (class 3), or a hundred
rows drawn at random. Erasers run with the settings that their certificates use on small models.

**Facts.** SmolLM2 learns facts of elements and countries as questions and answers, those of elements in two wordings;
then it is to forget all about twelve elements, and is given the first wording of these alone. The size of an eraser's
steps was chosen on a seed of its own (``--tune``): the one that comes nearest to the model trained again. A small model
of bytes learns fewer of them, and is to forget four elements (``facts-small``).

Each result is audited as a user would (``vestige.evidence.audit_erasure``): accuracy on what was to be forgotten, kept
and never seen, membership inference, relearning, probes, four bits, and for language questions in other words; the same
of the model before and of the one trained again. *finetune* goes on learning what is to be kept.

Results go beside this script, a row for each task, eraser and seed; what is there is not run again, so that an
interrupted run goes on. A method that is added to the package appears by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Clock, Pictures, Sheet, forms_of, here, known, label, made_room, options, pictures, rows_of
from torch import Tensor
from torch.utils.data import TensorDataset

import vestige
from vestige.errors import VestigeError
from vestige.evidence.certify.erasing import EraserCase
from vestige.evidence.erasure import Relearning, audit_erasure
from vestige.evidence.runs.models import teach
from vestige.evidence.runs.spec import Learning
from vestige.weights.erase.eraser import Eraser, Work
from vestige.weights.erase.examples import Examples, Reader
from vestige.weights.modes import evaluating

CLASS, ROWS = 3, 100
TASKS = {"digits": ("class", "random"), "fashion-mnist": ("class", "random")}
TASKS |= {"facts": ("elements",), "facts-small": ("elements",)}
ELEMENTS: dict[str, tuple[int, int | None]] = {"facts": (12, None), "facts-small": (4, 16)}  # of how many
TEACHING = {
    "digits": Learning(epochs=12, learning_rate=3e-3, batch=50),
    "fashion-mnist": Learning(epochs=12, learning_rate=2e-3, batch=50),
    "facts": Learning(epochs=8, learning_rate=1e-4, batch=32),
    "facts-small": Learning(epochs=40, learning_rate=3e-3, batch=16),
}
FURTHER = 0.25  # of the epochs and of the step size of teaching, with which the baseline goes on
RELEARNING = {
    "pictures": Relearning(learning_rate=1e-3, steps=20),
    "facts": Relearning(learning_rate=1e-5, steps=20),
    "facts-small": Relearning(learning_rate=5e-4, steps=20),
}
LOOKED_AT = {"pictures": 300, "facts": 120, "facts-small": 120}  # rows of a set, at most
FINETUNE, ERASED, TUNING = "finetune", "erased", 100
# Forms of methods that are worth a row beside the one with the settings of the certificate.
FORMS: dict[str, list[dict[str, Any]]] = {"ssd": [{"estimator": "per-example"}]}
# Of facts: what stays the same, and what is chosen from.
STEPPED = {"epochs": 10, "check_every": 2, "tolerance": 0.25}
Grid = tuple[dict[str, Any], list[dict[str, Any]]]


def _grids(
    target: float, rates: tuple[float, ...], steps: tuple[float, ...], lora: tuple[float, ...]
) -> dict[str, Grid]:
    """By eraser; the first is what is tried first, and taken where nothing was tried.

    Args:
        target: what a trained model has right of answers that it was not taught: the ends of answers, what it knew
            before, and what is easily guessed.
        rates, steps, lora: sizes of steps.
    """
    descents: list[dict[str, Any]] = [{"learning_rate": rate} for rate in rates]
    stepped = {**STEPPED, "target": target}
    inside = [{"eraser": {"name": "random-label-forgetting", **stepped, **rate}} for rate in descents]
    # How much is selected, and how far it shrinks; the share that alpha is chosen by was looked at with classifiers.
    dampened = [{"dampening": 1.0}, *({"alpha": alpha, "dampening": 1.0} for alpha in (10, 100)), {"dampening": 0.1}]
    return {
        "iau": ({"tolerance": 0.25}, [{"step": step} for step in steps]),
        "gs-lora": (stepped, [{"learning_rate": rate} for rate in lora]),
        "npo": (stepped, descents),
        "gradient-ascent": (stepped, descents),
        "random-label-forgetting": (stepped, descents),
        "salun": ({}, inside),
        "ssd": ({}, dampened),
    }


GRIDS: dict[str, dict[str, Grid]] = {
    "facts": _grids(
        target=0.75,
        rates=(1e-5, 3e-6, 3e-5, 1e-4),
        steps=(1e-5, 3e-6, 3e-5, 1e-4, 2e-4, 3e-4),
        lora=(1e-3, 3e-4, 3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "facts-small": _grids(
        target=0.6, rates=(3e-4, 1e-4, 1e-3), steps=(1e-3, 3e-4, 3e-3, 1e-2), lora=(1e-2, 3e-3, 3e-2, 1e-1)
    ),
}
# By which a result is held against the model trained again.
COMPARED = ("forget accuracy", "paraphrases accuracy", "retain accuracy", "unseen accuracy")


@dataclass(frozen=True)
class Task:
    """What is to be forgotten and kept, and what no model was taught.

    Attributes:
        forget, retain: rows, as erasers take them.
        unseen: rows of the kind of what is to be forgotten.
        others: further rows that nothing was taught of; none for facts.
        paraphrases: what is to be forgotten in other words; none for pictures.
        new: a model that has learnt nothing of it.
        how: models are taught.
    """

    forget: list[Any]
    retain: list[Any]
    unseen: list[Any]
    others: list[Any]
    paraphrases: list[Any]
    new: Callable[[], Any]
    how: Learning
    kind: str

    @property
    def sets(self) -> dict[str, list[Any]]:
        """Those that an audit is given."""
        named = {"forget": self.forget, "retain": self.retain, "unseen": self.unseen, "paraphrases": self.paraphrases}
        return {name: rows for name, rows in named.items() if rows}

    def taught(self, rows: list[Any]) -> Any:
        model = self.new()
        teach(model, rows, self.how)
        return model


def made(data: str, name: str, how: Learning, device: str) -> Task:
    """The task of a name, drawn by the seed of the teaching."""
    return on_facts(data, how, device) if data in GRIDS else on_pictures(pictures(data, how.seed), name, how, device)


def on_pictures(data: Pictures, name: str, how: Learning, device: str) -> Task:
    (images, labels), (_, asked) = data.train.tensors, data.test.tensors
    if name == "class":
        gone, alike = labels == CLASS, asked == CLASS
    else:
        gone, alike = torch.zeros(len(images), dtype=torch.bool), torch.ones_like(asked, dtype=torch.bool)
        gone[torch.randperm(len(images), generator=torch.Generator().manual_seed(how.seed))[:ROWS]] = True
    forget, retain = _some(data.train, gone), _some(data.train, ~gone)
    unseen, others = _some(data.test, alike), _some(data.test, ~alike if name == "class" else alike)
    return Task(forget, retain, unseen, others, [], lambda: data.model(how.seed).to(device), how, "pictures")


def _some(data: TensorDataset, which: Tensor) -> list[Any]:
    return rows_of(TensorDataset(*(t[which] for t in data.tensors)))


def on_facts(data: str, how: Learning, device: str) -> Task:
    import language

    def known() -> Any:
        return language.new_small(device, how.seed) if data == "facts-small" else language.smollm2(device)

    sets = language.facts_to_forget(known().tokenizer, how.seed, *ELEMENTS[data])
    new = lambda: known().model  # noqa: E731
    return Task(sets.forget, sets.retain, sets.unseen, [], sets.paraphrases, new, how, data)


def work_on(model: Any, task: Task) -> Work:
    """What asks a model."""
    reader = Reader.of(model, None)
    forget, retain = Examples(task.forget, "forget", reader), Examples(task.retain, "retain", reader)
    return Work(model, forget, retain, retain, reader, task.how.batch, 0, dict(model.named_parameters()))


def accuracies(model: Any, task: Task) -> dict[str, float]:
    """On each set, in the names of the audit."""
    work = work_on(model, task)
    sets = {**task.sets, **({"unseen others": task.others} if task.others else {})}
    with evaluating(model, gradients=False):
        return {f"{name} accuracy": work.score(Examples(rows, name, work.reader))[1] for name, rows in sets.items()}


def told(model: Any, task: Task) -> dict[str, float | None]:
    """What an audit says of a model, by measure."""
    audit = audit_erasure(
        model,
        **task.sets,  # type: ignore[arg-type]
        relearning=RELEARNING[task.kind],
        rows=LOOKED_AT[task.kind],
        batch_size=task.how.batch,
        seed=task.how.seed,
    )
    # Accuracies are of all rows of a set.
    return {**{m.name: m.value(ERASED) for m in audit.measures}, **accuracies(model, task)}


def apart(measures: dict[str, dict[str, float]]) -> float:
    """The mean distance from the model trained again."""
    return mean(abs(m[ERASED] - m["retrained"]) for name, m in measures.items() if name in COMPARED)


def best(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """By eraser, the changes that came nearest to the model trained again."""
    least: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in (row for path in paths for row in known(path)):
        if "measures" in row:
            found = (apart(row["measures"]), row["changes"])
            least[row["method"]] = min(least.get(row["method"], (math.inf, {})), found, key=lambda pair: pair[0])
    return {name: changes for name, (_, changes) in least.items()}


def settings_of(data: str, only: list[str] | None, tuned: list[Path], tune: bool) -> list[tuple[str, dict[str, Any]]]:
    """The erasers and their changes from the settings of the certificate."""
    tried = GRIDS.get(data, {})
    if not tried:
        forms = forms_of(Eraser, FORMS, only)
    elif tune:
        grids = {name: grid for name, (_, grid) in tried.items() if not only or name in only}
        most = max(len(grid) for grid in grids.values())
        forms = [(name, grid[n]) for n in range(most) for name, grid in grids.items() if n < len(grid)]
    else:
        chosen = best(tuned)
        forms = forms_of(Eraser, {name: [] for name in tried}, only)
        forms = [(name, chosen.get(name) or (tried[name][1][0] if name in tried else {})) for name, _ in forms]
    if not tune and (not only or FINETUNE in only):
        forms.insert(0, (FINETUNE, {}))
    return [(name, changes) for name, changes in forms if name != "retrain"]  # the reference of all


def erased(name: str, changes: dict[str, Any], model: Any, task: Task) -> dict[str, Any]:
    """Let a method work on a model, in place; what it says of it."""
    if name == FINETUNE:
        began = time.perf_counter()
        less = {"epochs": max(1, round(FURTHER * task.how.epochs)), "learning_rate": FURTHER * task.how.learning_rate}
        teach(model, task.retain, task.how.model_copy(update=less))
        return {"seconds": time.perf_counter() - began, "stopped": "finished"}
    method = EraserCase(method=vestige.method(name)).fitted
    changes = {**GRIDS.get(task.kind, {}).get(name, ({}, []))[0], **changes}
    trace = method.replace(**changes).erase(
        model, forget=task.forget, retain=task.retain, batch_size=task.how.batch, seed=task.how.seed
    )
    return {"seconds": trace.seconds, "stopped": trace.stopped}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", choices=sorted(TEACHING), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: 0 1 2; {TUNING} where settings are chosen")
    parser.add_argument("--tune", action="store_true", help="try settings, on facts")
    parser.add_argument("--tuned", type=Path, nargs="+", help="what --tune wrote; default: the file beside this script")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = f"erase-{args.data}{'-tuning' if args.tune else ''}.json"
    tuned = args.tuned or [Path(__file__).with_name(f"erase-{args.data}-tuning.json")]
    forms = settings_of(args.data, args.only, tuned, args.tune)
    clock, how = Clock(args.minutes), TEACHING[args.data]
    sheet = Sheet(args.out or Path(__file__).with_name(name), here(args.device))
    seeds = args.seeds or ([TUNING] if args.tune else [0, 1, 2])
    for seed, task_name in [(seed, task) for seed in seeds for task in TASKS[args.data]]:
        # Forms of one method are told apart, but where one was chosen among them.
        rows = [
            {"task": task_name, "eraser": name if args.data in GRIDS and not args.tune else label(name, changes)}
            | {"seed": seed, "method": name, "changes": changes}
            for name, changes in forms
        ]
        wanted = [row for row in rows if not sheet.has(task=task_name, eraser=row["eraser"], seed=seed)]
        if not wanted or clock.over:
            continue
        task = made(args.data, task_name, how.model_copy(update={"seed": seed}), args.device)
        look = accuracies if args.tune else told
        before, retrained = task.taught([*task.forget, *task.paraphrases, *task.retain]), task.taught(task.retain)
        # Both are the same beside every eraser, so they are looked at once.
        beside = {"retrained": look(retrained, task), "before": look(before, task)}
        del retrained
        start = {name: value.clone() for name, value in before.state_dict().items()}
        sheet.head |= {"data": args.data, **how.model_dump(exclude={"seed"}), "vestige": vestige.__version__}
        sheet.head |= {f"{task_name}: rows": {name: len(rows) for name, rows in task.sets.items()}}
        for row in wanted:
            if clock.over:
                break
            before.load_state_dict(start)
            before.eval()
            made_room(args.device)
            try:
                row |= erased(row["method"], row["changes"], before, task)
            except VestigeError as error:
                row["left_out"] = str(error)
            else:
                found = {ERASED: look(before, task), **beside}
                row["measures"] = {name: {who: f.get(name) for who, f in found.items()} for name in found[ERASED]}
            sheet.add(row)


if __name__ == "__main__":
    main()
