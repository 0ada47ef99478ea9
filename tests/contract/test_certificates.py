"""Every check of every registered method: a method that is defined is tested here, unasked.

The same checks are what ``vestige certify NAME`` runs. A method whose verdict is "not yet checked" is under
construction: it may still lack its reference, its claims and its verdict, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

import vestige
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.certify import Case, NotApplicable, build_case, checks_of
from vestige.evidence.certify.suite import POINTS


def _class(name):
    """The class of a method, or ``None``: one that does not load fails a test of its own, not the whole collection."""
    with contextlib.suppress(SpecError):
        return registry.load(name)


# Other tests define methods of their own while they are collected.
NAMES = [card.name for card in vestige.methods() if card.module.startswith("vestige.")]
CLASSES = {name: cls for name in NAMES if (cls := _class(name)) is not None}
CHECKS = [(name, check) for name, cls in CLASSES.items() for check in checks_of(cls)]


def _mark(name, check):
    marks = [pytest.mark.slow] if check.slow else []
    return pytest.param(name, check, marks=marks, id=f"{name}-{check.point}-{check.name}".replace(" ", "-"))


@functools.cache
def case_of(name: str) -> Case:
    return build_case(name)


@pytest.mark.parametrize(("name", "check"), [_mark(*pair) for pair in CHECKS])
def test_certificate(name, check):
    case = case_of(name)
    torch.manual_seed(0)
    try:
        check.run(case)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except AssertionError as failure:
        verdict = case.method.verdict
        if check.claim and verdict.status in ("not reproduced", "not checkable here"):
            pytest.skip(f"{verdict.status}: {verdict.seen}; now: {failure}")
        may_lack = check.claim or (not check.fills and check.point in ("reference", "behaviour"))
        if may_lack and verdict.status == "not yet checked":
            pytest.xfail(f"under construction: {failure}")
        raise


@pytest.mark.parametrize("name", NAMES)
def test_every_method_loads(name):
    assert registry.load(name).name == name


@pytest.mark.parametrize("name", CLASSES)
def test_no_point_is_without_a_check(name):
    """A method that is done, which is one that states its verdict, has something to show for each point."""
    cls = CLASSES[name]
    empty = set(POINTS) - {check.point for check in checks_of(cls) if check.fills}
    if empty and cls.verdict.status == "not yet checked":
        pytest.xfail(f"under construction: nothing checked for {', '.join(sorted(empty))}")
    assert not empty
