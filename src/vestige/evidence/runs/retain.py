"""Let learners go through a stream, and see what each keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vestige.core.ledger import Ledger
from vestige.errors import InputError, SpecError
from vestige.evidence.runs.models import build, tokenizer_of
from vestige.evidence.runs.sources import Examples, encoded, examples
from vestige.evidence.runs.spec import Retaining, differing, read_spec, write_spec
from vestige.training.quiet import without_talk_of_times
from vestige.weights.retain import ContinualRun, ContinualTrainer, Learner, Stream
from vestige.weights.retain.checkpoint import write_tensors
from vestige.weights.retain.padding import PadTokens

if TYPE_CHECKING:
    import pandas
    from transformers import TrainingArguments

__all__ = ["Retained", "arguments", "general_of", "run_retention", "stream_of"]

LEARNT = "learnt.safetensors"
"""In a learner's folder: what it learnt beside the model's own weights, if anything, with its spec."""
DESCRIPTION = "retention.yaml"


@dataclass(frozen=True)
class Retained:
    """What came of a run.

    Attributes:
        folder: holds ``report.html``, ``ledger.jsonl``, ``retention.yaml``, and a folder per learner.
        runs: the result of each learner, by its label.
    """

    folder: Path
    runs: dict[str, ContinualRun]

    def table(self) -> pandas.DataFrame:
        """One row per learner: average, forgetting and the rest, bytes, seconds."""
        import pandas

        rows = {}
        for label, run in self.runs.items():
            held = {"replay_bytes": run.replay_bytes, "state_bytes": run.state_bytes, "seconds": sum(run.seconds)}
            rows[label] = {**run.metrics(), **held}
        return pandas.DataFrame.from_dict(rows, orient="index")


def run_retention(
    source: str | os.PathLike[str] | Mapping[str, Any] | Retaining,
    *,
    resume: bool = True,
    tell: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Retained:
    """Let every learner of a description learn its stream, from the same model.

    Checkpoints are kept after each experience, and an interrupted run goes on where it was.

    Args:
        source: a YAML file, a mapping, or a description.
        resume: go on with what the folder holds.
        tell: is told what is going on, a line at a time.
        changes: of fields, as ``out`` or ``seed``.

    Raises:
        SpecError: a wrong description, or a folder that holds another run.
        InputError, ModelError, TrainingError, MissingPackageError: as the parts that it calls.
    """
    spec = read_spec(Retaining, source, **changes)
    learners = [Learner.from_spec(each if isinstance(each, dict) else {"name": each}) for each in spec.learners]
    for learner in learners:
        if not isinstance(learner, Learner):
            raise SpecError(f"field 'learners' holds {learner.spec()!r}; allowed: learners")
    labels = [learner.label for learner in learners]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {n}" for n, label in enumerate(labels, 1)]
    found = examples(spec.data)
    tokenizer = tokenizer_of(spec.model) if found.kind == "text" else None
    stream, collator = stream_of(found, spec.experiences, spec.kind, tokenizer, spec.blur)
    general = general_of(found, tokenizer)
    described = spec.out / DESCRIPTION
    if not _taken_up(spec, described):
        write_spec(spec, described)
    ledger = Ledger(spec.out / "ledger.jsonl")
    runs = {}
    for label, learner in zip(labels, learners, strict=True):
        tell(f"{label}: {len(stream)} experiences")
        folder = spec.out / label.replace(" ", "-")
        args = arguments(folder, {"save_strategy": "epoch", "save_total_limit": 1, **spec.train}, spec.seed)
        trainer = ContinualTrainer(
            build(spec.model, found, tokenizer),
            learner,
            args,
            collator=collator,
            general=general if learner.needs_general else None,
            held_out=general if found.kind == "text" else None,
            ledger=ledger,
            model_name=spec.model.load or "new",
        )
        with without_talk_of_times():
            runs[label] = trainer.run(stream, resume=resume)
        assert trainer.running is not None
        if learnt := trainer.running.learnt():
            write_tensors(folder / LEARNT, learnt, {"method": json.dumps(learner.spec())})
        tell(f"{label}: average {runs[label].average:.3f}, forgetting {runs[label].forgetting:.3f}")
    from vestige.evidence.report.retention_page import write_retention_report

    write_spec(spec, described)  # with learners and settings that were added since
    done = Retained(spec.out, runs)
    write_retention_report(done, spec, spec.out / "report.html")
    return done


def _taken_up(spec: Retaining, described: Path) -> bool:
    """Whether the folder holds a run of this stream, to go on with.

    Raises:
        SpecError: it holds results of another.
    """
    if not (spec.out / "ledger.jsonl").exists() and not any(spec.out.glob("*/stream.json")):
        return False
    try:
        other = differing(spec, described, ("data", "experiences", "kind", "blur", "model", "seed"))
    except (OSError, yaml.YAMLError):
        return False
    if other is not None:
        raise SpecError(f"{spec.out} holds a run with another {other!r}; name another folder")
    return True


def arguments(folder: Path, fields: Mapping[str, Any], seed: int) -> TrainingArguments:
    """What transformers is to know of a training, which says nothing while it runs.

    Raises:
        SpecError: a field that it does not have, or a value that it refuses.
    """
    from transformers import TrainingArguments

    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": seed}
    try:
        return TrainingArguments(output_dir=str(folder), **{**quiet, **fields})
    except (TypeError, ValueError) as error:
        raise SpecError(f"field 'train': {str(error).splitlines()[0]}") from None


def general_of(found: Examples, tokenizer: Any) -> list[Any]:
    """Rows that no experience teaches, as models take them."""
    return list(found.test) if found.kind == "images" else [encoded(tokenizer)(r, "question") for r in found.test]


def stream_of(found: Examples, experiences: Any, kind: Any, tokenizer: Any, blur: float = 0.0) -> tuple[Stream, Any]:
    """A stream of examples, and what puts its rows together (``None``: the usual).

    Raises:
        SpecError, InputError: ``experiences`` do not fit the examples.
    """
    if found.kind == "images":
        if isinstance(experiences, str):
            raise SpecError(f"field 'experiences' is {experiences!r}; allowed for images: a number, or classes")
        return Stream.by_class(found.train, found.test, experiences=experiences, kind=kind, blur=blur), None
    if blur:
        raise SpecError(f"field 'blur' is {blur}; allowed for questions: 0, as theirs are split by what is asked")
    if not isinstance(experiences, str):
        raise SpecError(f"field 'experiences' is {experiences!r}; allowed for questions: the name of a column")
    column = experiences
    values = list(dict.fromkeys(str(row[column]) for row in found.train if column in row))
    if not values:
        raise InputError(f"no example has a column {column!r}; columns: {', '.join(found.train[0])}")
    encode = encoded(tokenizer)
    parts = {}
    for value in values:
        rows = [row for row in found.train if str(row.get(column)) == value]
        taught = [encode(row, "question") for row in rows]
        # What was learnt is asked for as it was taught: a fact cannot be worked out from others.
        parts[value] = (taught, taught)
    return Stream.of(parts, kind="domain", inputs="input_ids"), PadTokens(tokenizer.pad_token_id or 0)
