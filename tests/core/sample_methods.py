"""Methods for the tests of the contract; the fixture ``samples`` registers them and takes them out again."""

from __future__ import annotations

from typing import Literal

from vestige.core import Method, Paper, Verdict, param
from vestige.errors import SpecError

PAPER = Paper(title="On samples", year=2024, arxiv="2401.00001", equations="eq. 1")


class Sample(Method):
    """A family of methods."""

    shared: int = param(1, "in every member", ge=0)


class Plain(Sample):
    """Keep what comes first.

    The second paragraph is no part of the idea.
    """

    name = "sample-plain"
    paper = PAPER
    verdict = Verdict("reproduced", "as claimed")

    budget: int | float = param(0.5, "tokens, or a share of them", gt=0)
    rate: float = param(1e-5, "per token", ge=0, lt=1)
    when: Literal["both", "prefill"] = param("both", "when to act")
    heads: tuple[int, ...] = param((), "which heads")
    label: str | None = param(None, "a name")
    exact: bool = param(False, "all digits")
    needed: int = param(help="has no default")

    def check(self) -> None:
        if self.budget == 13:
            raise SpecError("sample-plain: parameter 'budget' is 13; allowed: any other")


class Nesting(Sample):
    """A method made of another."""

    name = "sample-nesting"
    paper = PAPER

    inner: Sample = param(help="the method within")
    table: tuple[tuple[int, float], ...] = param(factory=lambda: ((1, 0.5),), help="pairs")


class Other(Method):
    """Of no family."""

    name = "sample-other"
    paper = PAPER


ALL = (Plain, Nesting, Other)
