"""The contract that every method of Vestige shares.

A method is a frozen, keyword-only dataclass of hyper-parameters. It names its paper,
validates itself when it is built, and holds no run-time state, so one object serves many
models. Defining the class registers it::

    class Streaming(CachePolicy):
        "Keep the attention sinks and the most recent tokens."

        name = "streaming-llm"
        paper = Paper(title="Efficient Streaming Language Models with Attention Sinks", ...)

        sinks: int = param(4, "first tokens that are always kept", ge=0)

What a family adds (``attach``, ``convert``, ``erase``, ``measure`` ...) stands in the
family's base class, not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, dataclass_transform

from vestige.core.spec import Spec, did_you_mean, nearest, param
from vestige.errors import SpecError

if TYPE_CHECKING:
    from vestige.core.registry import Registry

__all__ = ["Method", "Paper", "Verdict", "did_you_mean", "nearest", "param"]

Status = Literal["reproduced", "not reproduced", "not checkable here", "not yet checked"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from.

    ``equations`` says which of the paper's equations, algorithms or sections the code
    implements; ``code`` is the authors' repository, where there is one.
    """

    title: str
    year: int
    arxiv: str | None = None
    venue: str | None = None
    code: str | None = None
    equations: str | None = None

    @property
    def url(self) -> str | None:
        """Address of the paper, where it has an arXiv identifier."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True)
class Verdict:
    """Whether the paper's claim was seen here, and what was seen."""

    status: Status = "not yet checked"
    seen: str = ""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Method(Spec):
    """Base of all methods. See the module for how one is written.

    Class attributes
        name: the slug under which the method is registered (an abstract base has none).
        paper: its source.
        verdict: whether the paper's claim was reproduced here.

    Raises:
        SpecError: on construction, for an unknown parameter, a wrong type or a value out of range.
    """

    paper: ClassVar[Paper]
    verdict: ClassVar[Verdict] = Verdict()

    @classmethod
    def registry(cls) -> Registry:
        from vestige.core.registry import registry

        return registry

    @classmethod
    def check_class(cls) -> None:
        if not isinstance(getattr(cls, "paper", None), Paper):
            raise SpecError(f"{cls.__module__}.{cls.__qualname__} registers as {cls.name!r} but names no paper")
