"""Certify a method: the six points of evidence, from a slow reference to clear errors.

>>> from vestige.evidence.certify import certify
>>> certificate = certify("a2sf")
>>> certificate.holds
True

1. *reference*: a slow float64 implementation of the paper's equations agrees with the method.
2. *undo*: attached, used, detached: outputs bit-identical to before, nothing left behind.
3. *bytes*: what is reported equals the storage that is held.
4. *invariance*: padding, chunking, caching, saving, beams and precision change nothing that they should not.
5. *behaviour*: over at least three seeds the method does better than the baseline that it claims to beat.
6. *bad input*: every invalid parameter or input gives a clear error before any work is done.

:mod:`vestige.evidence.certify.suite` says how the checks of a family are written.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.certify.certificate import Certificate, Outcome, Status, describe
from vestige.evidence.certify.suite import (
    POINTS,
    Case,
    Check,
    CheckFailed,
    NotApplicable,
    Point,
    Suite,
    checks_of,
    suites_of,
)

__all__ = [
    "Case",
    "Certificate",
    "Check",
    "CheckFailed",
    "NotApplicable",
    "Outcome",
    "Suite",
    "build_case",
    "certify",
    "checks_of",
    "perform",
]


def certify(
    name_or_method: str | Method,
    *,
    model: Any = None,
    behaviour: bool = True,
    seeds: Iterable[int] = (0, 1, 2),
    points: Iterable[Point] | None = None,
    device: str = "cpu",
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Certificate:
    """Run every check of a method and say what held.

    A check that raises anything is recorded as failed, and the rest go on.

    Args:
        name_or_method: a registered name, or a method with the hyper-parameters to look at. Small models get
            budgets that fit them; the other hyper-parameters are kept.
        model: what to look at behaviour on: a name or path for :func:`vestige.models.load`, or a loaded
            ``(model, tokenizer)`` pair; the default is that of the method's family.
        behaviour: whether to run the checks of the fifth point, which take the most time.
        seeds: at least three, all different, for the behaviour checks.
        points: only these points; the certificate is then partial.
        device: where small models are put (``"cpu"``, ``"cuda"``).
        on_outcome: called after each check, for progress bars.

    Raises:
        SpecError: unknown name, invalid method, fewer than three seeds, unknown point.
    """
    asked = tuple(POINTS if points is None else points)
    for point in asked:
        if point not in POINTS:
            raise SpecError(f"unknown point {point!r}; the points are {', '.join(POINTS)}")
    left_out = tuple(p for p in POINTS if p not in asked or (p == "behaviour" and not behaviour))
    case = build_case(name_or_method, model=model, seeds=seeds, device=device)
    outcomes = []
    for check in checks_of(type(case.method)):
        if check.point not in left_out:
            outcomes.append(perform(check, case))
            if on_outcome is not None:
                on_outcome(outcomes[-1])
    return Certificate(case.method.spec(), case.model_name, case.seeds, tuple(outcomes), left_out)


def build_case(
    name_or_method: str | Method, *, model: Any = None, seeds: Iterable[int] = (0, 1, 2), device: str = "cpu"
) -> Case:
    """The case that the checks of a method take.

    Raises:
        SpecError: unknown name, or fewer than three different seeds.
    """
    chosen = tuple(seeds)
    if len(set(chosen)) < 3 or len(set(chosen)) < len(chosen) or not all(type(seed) is int for seed in chosen):
        raise SpecError(f"parameter 'seeds' is {chosen!r}; allowed: at least three different whole numbers")
    if isinstance(name_or_method, Method):
        method, case = name_or_method, suites_of(type(name_or_method))[0].case
    else:
        cls = registry.load(name_or_method)
        case = suites_of(cls)[0].case
        method = case.default(cls)
    return case(method=method, model=model, device=device, seeds=chosen)


def perform(check: Check, case: Case) -> Outcome:
    """Run one check and record what came of it. Random numbers start anew for each, so that order does not matter."""
    import torch

    began = time.perf_counter()
    status: Status = "held"
    seen: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        try:
            seen = dict(check.run(case) or {})
            detail = describe(seen)
        except NotApplicable as reason:
            status, detail = "not applicable", str(reason)
        except AssertionError as failure:
            status, detail = "failed", str(failure) or "an assertion without a text failed"
        except Exception as error:  # whatever it is, the method did not hold
            status, detail = "failed", f"{type(error).__name__}: {error}"
    if status == "failed" and check.claim and case.method.verdict.status in ("not reproduced", "not checkable here"):
        status, detail = "not applicable", f"{case.method.verdict.status}: {case.method.verdict.seen}; now: {detail}"
    return Outcome(check.point, check.name, check.says, status, detail, seen, time.perf_counter() - began, check.fills)
