"""Erase what a description names, and look at what is left."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vestige.core.files import write_whole
from vestige.core.ledger import Ledger
from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.erasure import ErasureAudit, Relearning, audit_erasure
from vestige.evidence.runs.models import build, load_from, teach, tokenizer_of
from vestige.evidence.runs.sources import Row, chosen, encoded, examples
from vestige.evidence.runs.spec import Erasing, differing, read_spec, write_spec
from vestige.training.quiet import without_bars
from vestige.weights.erase.eraser import Eraser, Trace
from vestige.weights.erase.retrain import Retrain

__all__ = ["Erased", "run_erasure"]

DESCRIPTION = "erasure.yaml"


@dataclass(frozen=True)
class Erased:
    """What came of a run.

    Attributes:
        folder: holds ``erased`` (the model), ``report.html``, ``audit.json``, ``ledger.jsonl``, ``erasure.yaml``, and
            the models that were taught for it: ``before``, ``retrained``.
        trace: of the erasure; the model that it can be undone on is ``model``.
        audit: what is left.
        model: after the erasure.
    """

    folder: Path
    trace: Trace
    audit: ErasureAudit
    model: Any


def run_erasure(
    source: str | os.PathLike[str] | Mapping[str, Any] | Erasing,
    *,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Erased:
    """Teach (where asked), erase, audit, and leave model, page and ledger in a folder.

    Models that were taught are kept there; another run of the same description with another eraser takes them up.

    Args:
        source: a YAML file, a mapping, or a description.
        fresh: teach anew where the folder holds models.
        tell: is told what is going on, a line at a time.
        changes: of fields, as ``out``, ``seed`` or ``eraser``.

    Raises:
        SpecError: a wrong description, or a folder whose models were taught by another.
        InputError, ModelError, TrainingError, MissingPackageError: as the parts that it calls.
    """
    spec = read_spec(Erasing, source, **changes)
    eraser = Method.from_spec(spec.eraser)
    if not isinstance(eraser, Eraser) or isinstance(eraser, Retrain):
        raise SpecError(f"field 'eraser' is {spec.eraser!r}; allowed: {', '.join(_erasers())}")
    try:
        how = Relearning(**spec.relearning)
    except TypeError:
        allowed = ", ".join(Relearning.__dataclass_fields__)
        raise SpecError(f"field 'relearning' is {spec.relearning!r}; allowed: {allowed}") from None
    found = examples(spec.data)
    tokenizer = tokenizer_of(spec.model) if found.kind == "text" else None
    sets = chosen(found, spec.forget, spec.seed, encoded(tokenizer) if tokenizer else lambda row, _: row)
    _check_folder(spec, fresh)
    tell(f"{len(sets.forget)} examples to forget, {len(sets.retain)} to keep, {len(sets.unseen)} that are never taught")

    def taught(name: str, rows: list[Row]) -> Any:
        model = build(spec.model, found, tokenizer)
        if spec.learn is None:
            return model
        place = spec.out / name
        if (place / "config.json").is_file():
            tell(f"{name}: taught before, from {place}")
            return load_from(place, found.kind)
        epochs = spec.learn.epochs
        teach(model, rows, spec.learn, lambda n, loss: tell(f"{name}: pass {n} of {epochs}, loss {loss:.3f}"))
        _save(model, tokenizer, place)
        return model

    reference = None
    if spec.reference not in (None, "retrain"):  # what is not there is told before anything is taught
        reference = load_from(spec.reference, found.kind)
    # Written before anything is taught, so that a folder says what its models are.
    write_spec(spec, spec.out / DESCRIPTION)
    before = taught("before", sets.learnt)
    model = build(spec.model, found, tokenizer) if spec.learn is None else load_from(spec.out / "before", found.kind)
    if spec.reference == "retrain":
        reference = taught("retrained", sets.retain)
    tell(f"erasing with {eraser.name}")
    trace = eraser.erase(model, forget=sets.forget, retain=sets.retain, batch_size=spec.batch, seed=spec.seed)
    tell(f"erased in {trace.seconds:.1f} s, {trace.stopped}; looking at what is left")
    audit = audit_erasure(
        model,
        sets.forget,
        sets.retain,
        reference=reference,
        before=before,
        unseen=sets.unseen or None,
        paraphrases=sets.paraphrases or None,
        relearning=how,
        rows=spec.rows,
        batch_size=spec.batch,
        seed=spec.seed,
    )
    _save(model, tokenizer, spec.out / "erased")
    audit.report(spec.out / "report.html")
    write_whole(spec.out / "audit.json", json.dumps({"trace": _plain(trace), **audit.to_dict()}, indent=1))
    row = audit.row(trace.method, str(spec.model.load or "new"))
    Ledger(spec.out / "ledger.jsonl").append({**row, "report": trace.report, "erasing_seconds": trace.seconds})
    return Erased(spec.out, trace, audit, model)


def _erasers() -> list[str]:
    """The names of the erasers that work on a trained model."""
    of_room = (card for card in registry.cards("weights") if card.module.startswith("vestige.weights.erase."))
    return [card.name for card in of_room if card.name != Retrain.name]


def _plain(trace: Trace) -> dict[str, Any]:
    names = ("method", "report", "history", "stopped", "seconds")
    return {name: getattr(trace, name) for name in names}


def _check_folder(spec: Erasing, fresh: bool) -> None:
    """Refuse a folder whose models were taught otherwise; with ``fresh`` they are removed."""
    models = [spec.out / name for name in ("before", "retrained") if (spec.out / name).is_dir()]
    if fresh:
        for folder in models:
            shutil.rmtree(folder)
        return
    if not models:
        return
    try:
        other = differing(spec, spec.out / DESCRIPTION, ("data", "forget", "model", "learn", "seed"))
    except (OSError, yaml.YAMLError):
        other = "data"
    if other is not None:
        raise SpecError(
            f"{spec.out} holds models that were taught with another {other!r}; name another folder, or ask for fresh"
        )


def _save(model: Any, tokenizer: Any, place: Path) -> None:
    """Save a model for ``from_pretrained``, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        with without_bars():
            model.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)
        draft.replace(place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
