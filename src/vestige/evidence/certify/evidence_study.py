"""Checks for studies, on a run of a second: the hyper-parameters that the reference calls ``SMALL``."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.evidence.certify.suite import Case, NotApplicable, Seen, Suite, expect, refused
from vestige.evidence.references import reference_of
from vestige.evidence.studies.study import Study, StudyResult
from vestige.models.tiny import tiny_model, tiny_tokenizer

CLOSE = 1e-9  # of formulas, both sides in float64


class StudyCase(Case):
    """The study, and the small run that its mechanics are tried on."""

    method: Study

    @property
    def reference(self) -> Any:
        """The written-out equations."""
        return reference_of(self.method.name)

    @functools.cached_property
    def lm(self) -> tuple[Any, Any] | None:
        """A small model to look at, for studies that look at one."""
        return (tiny_model("llama", torch.float32, self.device), tiny_tokenizer()) if self.method.MODEL else None

    def toy(self, seeds: tuple[int, ...] = (0, 1), out: Any = None, **changes: Any) -> StudyResult:
        """A run of about a second."""
        study = self.method.replace(**{**self.reference.SMALL, **changes})
        return study.run(seeds=seeds, model=self.lm, out=out, device=self.device, progress=False)

    @functools.cached_property
    def plain_toy(self) -> StudyResult:
        """The small run, made once."""
        return self.toy()


suite = Suite(Study, case=StudyCase)
suite.not_applicable("bytes", "a study measures; it holds nothing between two runs")


@suite.check("reference")
def formulas_agree_with_the_equations(case: StudyCase) -> Seen:
    """Every formula that the study computes gives what the written-out equation gives in float64."""
    formulas, largest, compared = case.method.formulas(), 0.0, 0
    for seed in case.seeds:
        examples: Mapping[str, Mapping[str, Any]] = case.reference.examples(np.random.default_rng(seed))
        expect(set(examples) == set(formulas), f"formulas {sorted(formulas)}, of which {sorted(examples)} are written")
        for name, given in examples.items():
            mine = _numbers(formulas[name](**{key: _tensor(value) for key, value in given.items()}))
            due = _numbers(getattr(case.reference, name)(**given))
            expect(mine.shape == due.shape, f"{name} is of shape {mine.shape}, {due.shape} is due")
            expect(bool(np.isfinite(due).all()), f"{name} gives {due}, with which nothing can be compared")
            wrong = float(np.max(np.abs(mine - due) / np.maximum(1, np.abs(due)), initial=0))
            expect(wrong < CLOSE, f"{name} gives {mine}, due is {due}")
            largest, compared = max(largest, wrong), compared + due.size
    expect(compared > 0, "no formula was compared")
    return {"formulas": len(formulas), "numbers": compared, "difference": largest}


def _tensor(value: Any) -> Any:
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def _numbers(value: Any) -> np.ndarray:
    return value.numpy().astype(float) if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)


@suite.check("undo")
def a_run_leaves_everything_as_it_was(case: StudyCase) -> Seen:
    """Afterwards a model looked at gives the same logits, bit for bit, and torch's state is that of before."""
    before = _state(case)
    case.toy(seeds=(0,))
    for part, then, now in zip(("logits", "random numbers"), before[0], _state(case)[0], strict=True):
        expect(torch.equal(then, now), f"other {part} afterwards")
    expect(before[1] == _state(case)[1], f"torch was set to {before[1]}, now to {_state(case)[1]}")
    if case.lm is not None:
        expect(not Patch.active(case.lm[0]), "a patch is left on the model")
    return {"model looked at": case.method.MODEL or "none"}


def _state(case: StudyCase) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
    logits = torch.zeros(1)
    if case.lm is not None:
        with torch.no_grad():
            logits = case.lm[0](torch.arange(3, 60, device=case.device)[None]).logits
    settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    return (logits, torch.get_rng_state()), (settings, case.lm is not None and case.lm[0].training)


@suite.check("invariance")
def the_same_seed_measures_the_same(case: StudyCase) -> Seen:
    """A second run gives every number again, bit for bit, wherever torch's random numbers stand."""
    torch.rand(7)
    again = case.toy()
    expect(again.seen == case.plain_toy.seen, "a second run of the same seeds measures something else")
    first, second = case.plain_toy.seen
    expect(first != second, "another seed measures exactly the same, so the seed decides nothing")
    return {"numbers": len(list(_leaves(first)))}


@suite.check("invariance")
def batch_size_does_not_matter(case: StudyCase) -> Seen:
    """One trial at a time gives what several together give, up to rounding."""
    one, three = (case.toy(batch=batch).seen for batch in (1, 3))
    largest = 0.0
    for mine, due in zip(_leaves(list(one)), _leaves(list(three)), strict=True):
        same = mine == due or (math.isnan(mine) and math.isnan(due))
        largest = max(largest, 0.0 if same else abs(mine - due) / max(1.0, abs(due)))
    expect(largest < 1e-4, f"numbers differ by up to {largest:.3g} with the batch size")
    return {"difference": largest}


def _leaves(value: Any) -> Iterator[float]:
    """Every number in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, int | float):
        yield float(value)


@suite.check("invariance")
def a_run_is_taken_up_at_the_seed(case: StudyCase) -> Seen:
    """Seeds that the folder holds are not measured again, and give the findings, figures and page of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        case.toy(seeds=(1,), out=folder)
        taken_up = case.toy(out=folder)
        expect(taken_up.measured == 1, f"{taken_up.measured} seeds were measured where one was left")
        expect(taken_up.seen == case.plain_toy.seen, "taken up, the run measures something else")
        expect(taken_up.claims == case.plain_toy.claims, "taken up, the run finds something else")
        page = Path(str(taken_up.report)).read_text(encoding="utf-8")
        drawn = [figure.name for figure in taken_up.figures()]
        expect(bool(drawn) and all(f'id="{name}"' in page for name in drawn), f"the page lacks some of {drawn}")
        expect(all(len(finding.measured) == 2 for finding in taken_up.claims), "a finding lacks a seed")
        json.dumps(taken_up.summary())
    return {"findings": len(taken_up.claims), "figures": len(drawn)}


@suite.check("behaviour", slow=True)
def the_card_says_what_the_small_run_shows(case: StudyCase) -> Seen:
    """Over the seeds, the small scale comes to the verdict that stands on the card."""
    result = case.method.run(seeds=case.seeds, model=case.model, device=case.device, progress=False)
    seen = {finding.quantity: finding.spread for finding in result.claims}
    due = case.method.verdict.status
    expect(result.verdict.status == due, f"the card says {due}, the run {result.verdict.status}: {result.verdict.seen}")
    return {**seen, "seconds": result.seconds}


@suite.check("bad input")
def wrong_runs_are_refused(case: StudyCase) -> Seen:
    """A wrong scale, seeds, device, model or folder is refused by name before anything is measured."""
    study = case.method
    wrong: list[tuple[str, dict[str, Any]]] = [("scale", {"scale": "tiny"}), ("device", {"device": "abacus"})]
    wrong += [("seeds", {"seeds": seeds}) for seeds in ((), (0, 0), (-1,), (0.5,), ("0",))]
    wrong.append(("model", {"model": ("one",)} if study.MODEL else {"model": "smollm2"}))
    for name, given in wrong:
        refused(SpecError, lambda given=given: study.run(progress=False, **given), name)  # type: ignore[misc]
    with tempfile.NamedTemporaryFile() as file:
        refused(InputError, lambda: study.run(out=file.name, progress=False), "out")
    return {"refused": len(wrong) + 1}


@suite.check("bad input")
def the_full_scale_is_described_rightly(case: StudyCase) -> Seen:
    """The full scale can be built, and is another than the small one."""
    small, full = case.method.at("small"), case.method.at("full")
    if not case.method.FULL:
        raise NotApplicable("the study has one scale")
    expect(small != full, "the full scale is the small one")
    return {"parameters that differ": len(case.method.FULL)}
