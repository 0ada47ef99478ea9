"""How a certificate is made up: points, checks, and the suites that hold the checks of a family.

A family of methods is a base class (``CachePolicy``, ``Mixer``, ``Learner`` ...). Its suite stands in the
module of this package that is named after the base class's room, or begins with the room's name and an
underscore (``context.py``; ``weights_erase.py``), and is found from the method's bases: nothing keeps a list.
A suite of a more general class holds for all below it, so the suite of :class:`~vestige.core.method.Method`
(in ``core.py``) holds for everything. A method of a third party is certified by the suite of the family whose
base class it derives from; a family of a third party makes its own :class:`Suite` beside its base class.

What a single method claims to do better than its baseline stands in ``vestige.evidence.claims``.

A check is a function of a case::

    suite = Suite(CachePolicy, case=CacheCase)

    @suite.check("undo")
    def outputs_are_bit_identical(case: CacheCase) -> Seen:
        "After the block the logits are those of before, bit for bit."
        ...
        return {"largest difference": 0.0}

It returns what it saw, raises :class:`CheckFailed` (an ``AssertionError``) where the method does not hold, and
:class:`NotApplicable` with the reason where the question makes no sense for this method.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vestige.core.method import Method
from vestige.errors import SpecError, VestigeError

__all__ = [
    "POINTS",
    "Case",
    "Check",
    "CheckFailed",
    "NotApplicable",
    "Point",
    "Seen",
    "Suite",
    "checks_of",
    "expect",
    "refused",
    "suites_of",
]

Point = Literal["reference", "undo", "bytes", "invariance", "behaviour", "bad input"]
POINTS: tuple[Point, ...] = get_args(Point)

Seen = Mapping[str, Any] | None
"""What a check saw: short names to numbers or short texts."""

CheckFunction = Callable[[Any], Seen]


class CheckFailed(AssertionError):  # noqa: N818 (reads as what happened)
    """The method does not do what the check asks; the text says what was seen."""


class NotApplicable(Exception):  # noqa: N818 (an outcome, not an error)
    """The check makes no sense for this method; the text says why."""


def expect(holds: bool, otherwise: str) -> None:
    """Raise :class:`CheckFailed` with a text unless a condition holds (``assert`` would vanish under ``-O``)."""
    if not holds:
        raise CheckFailed(otherwise)


def refused(error: type[VestigeError], call: Callable[[], Any], *words: str) -> str:
    """The text with which a call raises an error of a kind; it must contain the words.

    Raises:
        CheckFailed: no error, another one, or a text that lacks a word.
    """
    try:
        call()
    except error as seen:
        missing = [word for word in words if word not in str(seen)]
        expect(not missing, f"{error.__name__} does not speak of {', '.join(missing)}: {seen}")
        return str(seen)
    except Exception as seen:
        expect(False, f"{type(seen).__name__} was raised where {error.__name__} is due: {seen}")
    expect(False, f"no {error.__name__} was raised that speaks of {', '.join(words) or 'anything'}")
    raise AssertionError


@dataclass
class Case:
    """What a check is given: a method, and what to try it on. Families derive their own.

    Attributes:
        method: the method under certification.
        model: the model that behaviour is looked at on: a name or path for :func:`vestige.models.load`,
            a loaded ``(model, tokenizer)`` pair, or ``None`` for the default of the family.
        device: where small models and data are put.
        seeds: random seeds; every behaviour check runs over all of them.
    """

    method: Method
    model: Any = None
    device: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def model_name(self) -> str:
        """What the model is called in the certificate."""
        loaded = self.model[0] if isinstance(self.model, tuple) else self.model
        return str(getattr(getattr(loaded, "config", None), "name_or_path", None) or loaded or "default")

    @classmethod
    def default(cls, method: type[Method]) -> Method:
        """An object of a method class where the user gave only its name; families fill in required parameters."""
        return method()


@dataclass(frozen=True)
class Check:
    """One question to a method. Call :attr:`run` with a case; see :class:`Suite`."""

    point: Point
    name: str
    says: str
    run: CheckFunction = field(repr=False, compare=False)
    slow: bool = False
    claim: bool = False  # what a paper finds: may fail where the method's verdict says so
    fills: bool = True  # enough for its point not to count as empty


_suites: list[Suite] = []


class Suite:
    """The checks that all methods below one base class must pass.

    Args:
        family: the base class.
        case: the class of the cases that the checks take; that of the most specific suite is built.
    """

    def __init__(self, family: type[Method], case: type[Case] = Case) -> None:
        self.family = family
        self.case = case
        self.checks: list[Check] = []
        self.reasons: dict[Point, str] = {}
        _suites.append(self)

    def check(
        self, point: Point, *, slow: bool = False, claim: bool = False, fills: bool = True
    ) -> Callable[[CheckFunction], CheckFunction]:
        """Add a function as a check of a point. Its docstring's first line says what holds.

        Args:
            point: one of the six.
            slow: whether it takes ten seconds and more on two cores; the plain test run then leaves it out.
            claim: whether it asks for what the method's paper finds; it may fail where the method's verdict says so.
            fills: whether it is enough for the point not to count as empty.
        """

        def add(function: CheckFunction) -> CheckFunction:
            self.checks.append(as_check(function, point, slow=slow, claim=claim, fills=fills))
            return function

        return add

    def not_applicable(self, point: Point, reason: str) -> None:
        """Declare that a whole point makes no sense for the family, and why."""
        self.reasons[point] = reason


def as_check(function: CheckFunction, point: Point, **marks: bool) -> Check:
    """A function as a check, with :class:`Check`'s marks; its name and the first line of its docstring name it."""
    if point not in POINTS:
        raise SpecError(f"{function.__qualname__}: unknown point {point!r}; the points are {', '.join(POINTS)}")
    says = (function.__doc__ or "").strip().split("\n")[0]
    if not says:
        raise SpecError(f"the check {function.__qualname__} says nothing: its docstring's first line is what holds")
    name = function.__name__.removeprefix("check_").replace("_", " ").strip()
    return Check(point=point, name=name, says=says, run=function, **marks)


def suites_of(cls: type[Method]) -> list[Suite]:
    """The suites that hold for a method class, the most specific first."""
    bases = [base for base in cls.__mro__ if issubclass(base, Method)]
    for base in bases:
        _import_room(base)  # type: ignore[arg-type]
    return [suite for base in bases for suite in _suites if suite.family is base]


def checks_of(cls: type[Method]) -> list[Check]:
    """Every check that a method class must pass, in the order of the points, its own claims included.

    A point that a suite declares to be not applicable keeps one entry, which says so.
    """
    from vestige.evidence.claims import claims_of

    suites = suites_of(cls)
    checks = [check for suite in reversed(suites) for check in suite.checks]
    checks += [as_check(claim, "behaviour", slow=slow, claim=True) for claim, slow in claims_of(cls)]
    declared: dict[Point, str] = {}
    for suite in reversed(suites):
        declared.update(suite.reasons)
    checks += [_declared(point, reason) for point, reason in declared.items() if all(c.point != point for c in checks)]
    return sorted(checks, key=lambda check: POINTS.index(check.point))


def _declared(point: Point, reason: str) -> Check:
    def declared(case: Case) -> Seen:
        raise NotApplicable(reason)

    return Check(point=point, name="declared", says="the family has nothing to show here", run=declared)


@functools.cache
def _import_room(base: type[Method]) -> None:
    """Import the modules of this package that are named after the room of a base class."""
    parts = base.__module__.split(".")
    if parts[0] != "vestige" or len(parts) < 2:
        return
    package = importlib.import_module(__package__ or "vestige.evidence.certify")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name == parts[1] or module.name.startswith(f"{parts[1]}_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
