"""The audit of an erasure: several ways to look for what is left, each beside a model that never saw it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.evidence.erasure.probe import Probed, probe
from vestige.evidence.erasure.quantise import in_four_bits
from vestige.evidence.erasure.relearn import Relearned, Relearning, relearn
from vestige.evidence.erasure.result import ErasureAudit, Measure
from vestige.evidence.erasure.scores import RowScores, exposure, row_scores
from vestige.evidence.statistics import Interval
from vestige.weights.erase.eraser import Work
from vestige.weights.erase.examples import Collate, Examples, Reader, checked, disjoint
from vestige.weights.modes import evaluating

__all__ = ["audit_erasure"]

ERASED, RETRAINED, BEFORE = "erased", "retrained", "before"


def audit_erasure(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    reference: nn.Module | None = None,
    before: nn.Module | None = None,
    unseen: Any = None,
    paraphrases: Any = None,
    relearning: Relearning | None = None,
    rows: int = 500,
    batch_size: int = 32,
    collate: Collate | None = None,
    seed: int = 0,
) -> ErasureAudit:
    """Measure what remains of ``forget`` in a model that was made to forget it.

    Looked at are: accuracy and loss on each set; how well losses tell rows to forget from unseen ones (membership
    inference); how many steps bring the forgotten back, and whether rows that are not taught come back with them; what
    a linear probe reads from hidden states; what is left with weights in four bits; for language models also how much
    is recited verbatim, and what is answered to questions asked in other words. All of it is measured on every model
    that is given. A number says little alone: the aim is to be near the retrained model, not low.

    The models are as before afterwards; what could not be measured is said in the result's ``notes``.

    Args:
        model: after the erasure; a classifier, or a causal language model.
        forget: the examples to forget, as an eraser takes them.
        retain: those to keep.
        reference: the same kind of model trained without ``forget``.
        before: the model before the erasure.
        unseen: examples of the kind of ``forget`` that none of the models has seen. Without them there is no membership
            inference.
        paraphrases: the rows of ``forget`` in other words (questions with the answers as labels).
        relearning: how the models are taught again.
        rows: of each set that are looked at, at most, drawn by the seed.
        batch_size: as in :meth:`~vestige.weights.erase.eraser.Eraser.erase`.
        collate: as there.
        seed: of all draws.

    Raises:
        InputError: a set is empty, ``forget`` overlaps with another set, labels are out of range, or a model is none or
            of another kind than the erased one.
        SpecError: ``rows`` or ``batch_size`` out of range.
        MissingPackageError: scikit-learn is not installed.
    """
    began = time.perf_counter()
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise SpecError(f"parameter {name!r} is {value!r}; allowed: a whole number >= 1")
    models = {ERASED: model, RETRAINED: reference, BEFORE: before}
    subjects = {name: each for name, each in models.items() if each is not None or name == ERASED}
    for name, each in subjects.items():
        if not isinstance(each, nn.Module):
            raise InputError(f"the {name} model is a {type(each).__name__}; allowed: a torch.nn.Module")
        if (own := _kind(each)) != (wanted := _kind(model)):
            raise InputError(f"the {name} model {own}; allowed: one that, as the erased one, {wanted}")
    given = {"forget": forget, "retain": retain, "unseen": unseen, "paraphrases": paraphrases}
    sources = {name: source for name, source in given.items() if source is not None}
    reader = Reader.of(model, collate)
    sets = {name: Examples(source, name, reader) for name, source in sources.items()}
    disjoint(sets["forget"], *(sets[name] for name in ("retain", "unseen") if name in sets))
    if "paraphrases" in sets:
        checked(sets["paraphrases"])
    how = relearning or Relearning()
    notes: list[str] = []
    found = {}
    for name, each in subjects.items():
        looked = _Looked(each, sources, collate, rows, batch_size, seed, how)
        found[name] = looked
        notes += [note for note in looked.notes if note not in notes]
    if unseen is None:
        notes.append("no unseen examples were given, so that there is no membership inference")
    audit = ErasureAudit(
        subjects=tuple(subjects),
        measures=tuple(_measures(found, how, reader.causal)),
        curves={name: looked.relearned for name, looked in found.items() if looked.relearned is not None},
        probes={name: looked.probed for name, looked in found.items() if looked.probed is not None},
        sizes={name: len(examples) for name, examples in sets.items()},
        rows=rows,
        relearning=how,
        causal=reader.causal,
        notes=tuple(notes),
        seed=seed,
        seconds=time.perf_counter() - began,
    )
    return audit


def _kind(model: nn.Module) -> str:
    """What a model is given and what it answers with."""
    reader = Reader.of(model, None)
    return f"takes {reader.inputs} and answers with {'tokens' if reader.causal else f'{reader.classes} labels'}"


class _Looked:
    """All that is measured on one model."""

    def __init__(
        self,
        model: nn.Module,
        sources: dict[str, Any],
        collate: Collate | None,
        rows: int,
        batch_size: int,
        seed: int,
        how: Relearning,
    ) -> None:
        reader = Reader.of(model, collate)
        sets = {name: _some(Examples(source, name, reader), rows, seed) for name, source in sources.items()}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = parameters or dict(model.named_parameters())
        forget, retain = sets["forget"], sets["retain"]
        work = Work(model, forget, retain, sets.get("unseen", retain), reader, batch_size, seed, parameters)
        self.notes: list[str] = []
        self.relearned: Relearned | None = None
        self.probed: Probed | None = None
        self.rounded: dict[str, RowScores] = {}
        frozen = [p for p in parameters.values() if not p.requires_grad]
        with evaluating(model, gradients=True):
            self.scores = {name: row_scores(work, examples) for name, examples in sets.items()}
            try:
                with in_four_bits(model):
                    self.rounded = {name: row_scores(work, sets[name]) for name in ("forget", "retain")}
            except UnsupportedModelError as error:
                self.notes.append(f"not looked at in four bits: {error}")
            read = probe(work, forget, retain)
            if isinstance(read, str):
                self.notes.append(f"no probe: {read}")
            else:
                self.probed = read
            if len(forget) < 2:
                self.notes.append("not taught again: that needs two rows to forget")
            else:
                taught, rest = forget.split(0.5, seed)
                for p in frozen:
                    p.requires_grad_(True)
                try:
                    self.relearned = relearn(work, taught, rest, how)
                finally:
                    for p in frozen:
                        p.requires_grad_(False)


def _some(examples: Examples, most: int, seed: int) -> Examples:
    """The rows, or as many of them as are looked at."""
    if len(examples) <= most:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return Examples(examples.source, examples.name, examples.reader, sorted(order[:most].tolist()))


def _measures(found: dict[str, _Looked], how: Relearning, causal: bool) -> list[Measure]:
    """The rows of the table, in order; those that no model has a value for are left out."""
    measures = []

    def add(name: str, says: str, values: Mapping[str, Interval | float | None], unit: str = "share") -> None:
        if values:
            measures.append(Measure(name, says, unit, dict(values)))

    what = "of tokens" if causal else "of rows"
    sets = {"forget": "to forget", "retain": "to keep", "unseen": "never seen", "paraphrases": "asked in other words"}
    for key, says in sets.items():
        have = {name: looked.scores[key] for name, looked in found.items() if key in looked.scores}
        add(f"{key} accuracy", f"{what} {says} answered rightly", {n: s.accuracy for n, s in have.items()})
        likely = "probability of a row's labels (geometric mean over tokens)" if causal else "probability of the label"
        add(f"{key} likelihood", f"{likely}, {says}", {n: s.likelihood for n, s in have.items()})
        if causal and key in ("forget", "paraphrases"):
            says = f"of a row {says} recited verbatim from its prompt by greedy decoding"
            add(f"{key} verbatim", says, {n: s.verbatim for n, s in have.items()})
    told = {n: (looked.scores["forget"], looked.scores["unseen"]) for n, looked in found.items()
            if "unseen" in looked.scores}  # fmt: skip
    add(
        "membership by loss",
        "area under the ROC curve, rows to forget against unseen ones; 0.5: nothing is told",
        {n: exposure(gone.loss, other.loss) for n, (gone, other) in told.items()},
    )
    if causal:
        add(
            "membership by rare tokens",
            "the same by the least expected fifth of a row's tokens",
            {n: exposure(gone.rare, other.rare) for n, (gone, other) in told.items()},
        )
    for key in ("forget", "retain"):
        rounded = {n: looked.rounded[key].accuracy for n, looked in found.items() if key in looked.rounded}
        add(f"{key} accuracy, 4 bits", f"{what} {sets[key]} answered rightly with weights in four bits", rounded)
    probed = {n: looked.probed for n, looked in found.items() if looked.probed is not None}
    add("probe", "of rows to forget whose label a linear probe reads, in the best layer",
        {n: max(p.forget) for n, p in probed.items()})  # fmt: skip
    taught = {n: looked.relearned for n, looked in found.items() if looked.relearned is not None}
    if taught:
        known = taught[BEFORE].taught[0] if BEFORE in taught else 1.0
        says = f"until rows that are taught again are known to {how.goal * known:.0%}; none: not within {how.steps}"
        add("steps to relearn", says, {n: r.reached(how.goal * known) for n, r in taught.items()}, "steps")
        says = "of the rest of the rows to forget answered rightly after half of them was taught again"
        add("back without teaching", says, {n: r.rest[-1] for n, r in taught.items()})
    return measures
