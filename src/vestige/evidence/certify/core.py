"""Checks that hold for every method, whatever its family: the contract itself.

Except for bad input they do not fill a point: that a reference exists is not yet that the method agrees with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any

import pydantic

from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.certify.suite import Case, NotApplicable, Seen, Suite, expect
from vestige.evidence.references import reference_of

suite = Suite(Method)


@suite.check("reference", fills=False)
def the_equations_are_written_down(case: Case) -> Seen:
    """A reference implementation stands under the method's name and says what it computes."""
    module = reference_of(case.method.name)
    expect(module is not None, f"there is no vestige.evidence.references module for {case.method.name!r}")
    expect(bool((module.__doc__ or "").strip()), f"the reference {module.__name__} does not say what it computes")  # type: ignore[union-attr]
    return {"module": module.__name__.rpartition(".")[2]}  # type: ignore[union-attr]


@suite.check("invariance", fills=False)
def the_spec_round_trips(case: Case) -> Seen:
    """Through its spec, JSON and YAML the method comes back equal."""
    method = case.method
    forms: dict[str, Any] = {"mapping": method.spec(), "JSON": method.to_json(), "YAML": method.to_yaml()}
    for form, spec in forms.items():
        again = Method.from_spec(spec)
        expect(again == method, f"{method!r} came back from {form} as {again!r}")
    expect(json.loads(method.to_json()) == method.spec(), "the JSON of the method is not its spec")
    return {"parameters": len(method.parameters())}


@suite.check("behaviour", fills=False)
def the_verdict_is_stated(case: Case) -> Seen:
    """The card says whether the paper's claim was seen here, and what was seen."""
    verdict = case.method.verdict
    expect(verdict.status != "not yet checked", "the verdict is 'not yet checked'")
    expect(bool(verdict.seen.strip()), f"the verdict {verdict.status!r} does not say what was seen")
    return {"verdict": verdict.status}


@suite.check("bad input")
def each_parameter_is_explained(case: Case) -> Seen:
    """The method, its paper and each of its parameters are described."""
    cls = type(case.method)
    silent = [name for name, described in cls.parameters().items() if not described["help"].strip()]
    expect(not silent, f"parameters without help: {', '.join(silent)}")
    card = registry.card(cls.name)
    expect(bool(card.idea), f"{cls.__name__} has no docstring")
    paper = cls.paper
    expect(
        bool(paper.title) and bool(paper.arxiv or paper.venue or paper.code), "the paper cannot be found from its card"
    )
    return {"parameters": len(cls.parameters())}


@suite.check("bad input")
def an_unknown_parameter_is_named(case: Case) -> Seen:
    """A misspelt parameter raises SpecError with its name and the nearest known one."""
    known = list(case.method.parameters())
    wrong = (known[0] if known else "parameter") + "x"
    text = _refusal(case.method, wrong, 1)
    expect(not known or known[0] in text.replace(wrong, ""), f"the error does not offer {known[:1]}: {text}")
    return {"refused": 1}


@suite.check("bad input")
def each_wrong_value_is_refused(case: Case) -> Seen:
    """Values out of range or of a wrong type raise SpecError with the parameter and the value."""
    tried = 0
    for name, values in wrong_values(type(case.method)).items():
        for value in values:
            text = _refusal(case.method, name, value)
            shown = repr(value)
            expect(shown in text or len(shown) > 60, f"the error for {name}={shown} does not show the value: {text}")
            tried += 1
    if not tried:
        raise NotApplicable("the method has no parameters")
    return {"values refused": tried}


def wrong_values(cls: type[Method]) -> dict[str, list[Any]]:
    """For each parameter, values that its declared type and bounds forbid."""
    hints = typing.get_type_hints(cls)
    wrong = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        kinds = _kinds(hint)
        beyond = _beyond(field.metadata.get("bounds", {}), kinds)
        strange = ["no such value", -7.5, True, None, math.nan, math.inf, {"no": "such"}, ("no", "such")]
        wrong[field.name] = beyond + [value for value in strange if not _accepts(hint, value) or _not_finite(value)]
    return wrong


def _kinds(hint: Any) -> set[Any]:
    return set(typing.get_args(hint)) or {hint}


def _beyond(bounds: dict[str, float], kinds: set[Any]) -> list[Any]:
    """The nearest values on the wrong side of each bound, of each type of number that is allowed."""
    steps = {"gt": 0, "ge": -1, "lt": 0, "le": 1}
    values: list[Any] = []
    for bound, limit in bounds.items():
        if int in kinds and float(limit).is_integer():
            values.append(int(limit) + steps[bound])
        if float in kinds:
            values.append(float(limit) + steps[bound] * 1e-6 * max(1.0, abs(limit)))
    return values


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value is of a declared type."""
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        adapter = pydantic.TypeAdapter(hint, config=None if _has_own_config(hint) else config)
        adapter.validate_python(value)
    except (pydantic.ValidationError, SpecError):
        return False
    return True


def _has_own_config(hint: Any) -> bool:
    """Pydantic refuses a config for types that bring their own."""
    return isinstance(hint, type) and (issubclass(hint, pydantic.BaseModel) or dataclasses.is_dataclass(hint))


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _refusal(method: Method, name: str, value: Any) -> str:
    """The text of the SpecError that a value gives, which must name the parameter."""
    try:
        type(method)(**{**method._values(), name: value})
    except SpecError as error:
        expect(name in str(error), f"the error for {name}={value!r} does not name the parameter: {error}")
        return str(error)
    except Exception as error:
        expect(False, f"{name}={value!r} raised {type(error).__name__} where SpecError is due: {error}")
    expect(False, f"{name}={value!r} was accepted")
    raise AssertionError
