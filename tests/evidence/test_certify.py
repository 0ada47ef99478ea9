"""The certificate itself, on made-up families: what counts as held, and that nothing slips through."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vestige.core.ledger import Ledger
from vestige.core.method import Method, Paper, Verdict, param
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.certify import Case, CheckFailed, NotApplicable, Suite, build_case, certify, checks_of, perform
from vestige.evidence.certify import suite as suite_module
from vestige.evidence.certify.core import wrong_values
from vestige.evidence.certify.suite import POINTS, Check, as_check, expect

PAPER = Paper(title="A made-up paper", year=2000, arxiv="0000.00000")


@pytest.fixture
def family(monkeypatch):
    """A family with one method, known only during the test."""
    monkeypatch.setattr(registry, "_defined", dict(registry._defined))
    monkeypatch.setattr(suite_module, "_suites", list(suite_module._suites))

    class Family(Method):
        budget: int | float = param(64, "entries", gt=0)

    class Toy(Family):
        """A toy."""

        name = "certificate-toy"
        paper = PAPER
        verdict = Verdict("reproduced", "a toy")
        share: float = param(0.5, "a share", ge=0, le=1)

    return Family, Toy


def holding(point):
    def check(case):
        """It is so."""
        return {"seen": 1.0}

    return as_check(check, point)


def full_suite(family, without=(), case=Case):
    suite = Suite(family, case=case)
    suite.checks += [holding(point) for point in POINTS if point not in without]
    return suite


def without_core_reference(certificate):
    """A toy has no reference module: leave that one core check aside."""
    outcomes = tuple(o for o in certificate.outcomes if o.name != "the equations are written down")
    return replace(certificate, outcomes=outcomes)


def test_holds_where_every_point_holds(family):
    base, toy = family
    full_suite(base)
    certificate = certify(toy())
    assert [o.name for o in certificate.failures] == ["the equations are written down"]
    assert not certificate.holds
    certificate = without_core_reference(certificate)
    assert certificate.holds and certificate.complete
    assert set(certificate.points.values()) == {"held"}


@pytest.mark.parametrize("point", [p for p in POINTS if p != "bad input"])
def test_an_empty_point_breaks_the_certificate(family, point):
    base, toy = family
    full_suite(base, without=[point])
    certificate = without_core_reference(certify(toy()))
    assert certificate.points[point] == "empty"
    assert not certificate.holds
    assert f"{point} empty" in certificate.summary


def test_a_point_may_be_declared_not_applicable(family):
    base, toy = family
    full_suite(base, without=["bytes"]).not_applicable("bytes", "holds nothing")
    certificate = without_core_reference(certify(toy()))
    assert certificate.holds
    assert [o.detail for o in certificate.of("bytes")] == ["holds nothing"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckFailed("seen 3, wanted 4"), "failed"),
        (AssertionError(), "failed"),
        (RuntimeError("out of order"), "failed"),
        (NotApplicable("makes no sense here"), "not applicable"),
    ],
)
def test_whatever_a_check_raises_is_recorded(family, error, status):
    _, toy = family

    def check(case):
        """It is so."""
        raise error

    outcome = perform(as_check(check, "undo"), Case(toy()))
    assert outcome.status == status
    assert str(error) in outcome.detail and outcome.detail


def test_an_interrupt_is_not_swallowed(family):
    _, toy = family

    def check(case):
        """It is so."""
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(as_check(check, "undo"), Case(toy()))


def test_random_numbers_do_not_depend_on_the_order(family):
    import torch

    _, toy = family

    def check(case):
        """It draws."""
        return {"drawn": float(torch.rand(()))}

    first = perform(as_check(check, "undo"), Case(toy()))
    torch.rand(7)
    before = torch.get_rng_state()
    assert perform(as_check(check, "undo"), Case(toy())).seen == first.seen
    assert torch.equal(torch.get_rng_state(), before)


def test_a_claim_that_was_not_reproduced_is_reported_so(family):
    _, toy = family

    def check(case):
        """It is better."""
        expect(False, "3 against 4")

    class Honest(toy):
        """Another toy."""

        name = "certificate-honest-toy"
        verdict = Verdict("not reproduced", "level with the baseline")

    claim = as_check(check, "behaviour", claim=True)
    assert perform(claim, Case(toy())).status == "failed"
    outcome = perform(claim, Case(Honest()))
    assert outcome.status == "not applicable"
    assert "level with the baseline" in outcome.detail and "3 against 4" in outcome.detail
    assert perform(as_check(check, "undo"), Case(Honest())).status == "failed"


def test_the_most_specific_case_and_all_suites_serve(family):
    base, toy = family

    class ToyCase(Case):
        @classmethod
        def default(cls, method):
            return method(budget=7)

    full_suite(base, case=ToyCase)
    case = build_case("certificate-toy")
    assert isinstance(case, ToyCase) and case.method == toy(budget=7)
    names = {check.name for check in checks_of(toy)}
    assert {"check", "the spec round trips"} <= names
    assert [POINTS.index(c.point) for c in checks_of(toy)] == sorted(POINTS.index(c.point) for c in checks_of(toy))


def test_points_can_be_left_out(family):
    base, toy = family
    full_suite(base)
    certificate = without_core_reference(certify(toy(), behaviour=False))
    assert certificate.holds and not certificate.complete
    assert certificate.points["behaviour"] == "left out" and not certificate.of("behaviour")
    assert "partial" in certificate.summary
    assert [o.point for o in certify(toy(), points=["undo"]).outcomes] == ["undo"]


def test_progress_is_told(family):
    base, toy = family
    full_suite(base)
    seen = []
    certificate = certify(toy(), on_outcome=seen.append)
    assert tuple(seen) == certificate.outcomes


def test_forms(family, tmp_path):
    base, toy = family
    full_suite(base)
    certificate = certify(toy())
    data = json.loads(certificate.to_json())
    assert data["method"] == toy().spec() and data["holds"] is False
    assert len(data["checks"]) == len(certificate.outcomes)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(certificate.row())
    (row,) = ledger.rows()
    assert row["task"]["name"] == "certificate" and row["method"] == toy().spec() and row["holds"] is False
    assert row["points"]["reference"] == "failed" and row["metrics"]["checks failed"] == 1
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(certificate)
    text = str(certificate)
    for outcome in certificate.outcomes:
        assert outcome.says in shown.get()
        assert outcome.name in text


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0, 1), (0, 1, 1, 2), (), ("a", "b", "c")])
def test_too_few_seeds(family, seeds):
    with pytest.raises(SpecError, match="seeds"):
        certify(family[1](), seeds=seeds)


def test_unknown_names():
    with pytest.raises(SpecError, match="a2sf"):
        certify("a2fs")
    with pytest.raises(SpecError, match="no-point"):
        certify("full", points=["no-point"])


def test_wrong_values_are_derived(family):
    wrong = wrong_values(family[1])
    assert 0 in wrong["budget"] and 0.0 in wrong["budget"] and "no such value" in wrong["budget"]
    assert any(isinstance(v, float) and v < 0 for v in wrong["share"])
    assert any(isinstance(v, float) and 1 < v < 1.1 for v in wrong["share"])
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(SpecError, match=name):
                family[1](**{name: value})


def test_a_lax_parameter_is_found_out(family):
    """A method that swallows what its bounds forbid does not pass."""

    class Lax(family[1]):
        """A lax toy."""

        name = "certificate-lax-toy"

    def swallow(self, **values):
        for key in ("budget", "share"):
            object.__setattr__(self, key, values.get(key, 0.5))

    Lax.__init__ = swallow
    check = next(c for c in checks_of(Lax) if c.name == "each wrong value is refused")
    outcome = perform(check, Case(Lax()))
    assert outcome.status == "failed" and "accepted" in outcome.detail


def test_a_check_must_say_something():
    def silent(case):
        return None

    with pytest.raises(SpecError, match="says nothing"):
        as_check(silent, "undo")
    silent.__doc__ = "It is so."
    with pytest.raises(SpecError, match="unknown point"):
        as_check(silent, "somewhere")
    assert as_check(silent, "undo") == Check("undo", "silent", "It is so.", silent)
