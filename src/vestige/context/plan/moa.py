"""MoA: a window per head that grows with the text, chosen for the least loss under a density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from vestige.context.plan.windows import HeadWindows, Table, window
from vestige.core.anatomy import Anatomy
from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MoA"]

HALF = 0.5  # the density whose rules a model is given where nothing else is said


class MoA(HeadWindows):
    r"""Give each head a window by an elastic rule, alpha + beta *N* of *N* tokens, beside the first tokens.

    Some heads need a fixed stretch of the recent past, some a part of all there is. Which rule a head gets is worked
    out once for a model (:meth:`fit`): gradients say what each head's loss of sight would cost, at several lengths of
    text, and an integer program picks the rules that cost least while the heads together hold no more than a
    ``density`` of the tokens at any of the lengths.

    *N* counts all tokens so far, so that windows go on growing while decoding. A prompt's chunk attends to itself as a
    whole, whatever the head; then the heads are cut.
    """

    name = "moa"
    paper = Paper(
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        year=2024,
        arxiv="2406.14909",
        code="https://github.com/thu-nics/MoA",
        equations="section 3 (elastic rules), 4.1 (influence of attention values), 4.2 (choice under a density)",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2, density 0.5: copying a stretch from far back costs 0.98 nats a token, with the whole cache "
        "0.92, with equal windows 3.4. Windows go by heads, so what is asked later need not be known: of "
        "needles in 512 tokens 93% are found at 63% of the bytes (the least windows weigh in so short a text), "
        "with rules for a quarter and windows of 12 at least 60%, for a tenth none. At half "
        "56% of a needle's tokens are held, but 78% in the heads that look for it when it is asked for",
    )

    alpha: Table = param((), "tokens of each layer's key-value heads' windows that do not grow; may be negative")
    beta: Table = param(
        (), "part of the tokens so far by which the windows grow; both empty: those known for the model"
    )
    density: float = param(
        HALF, "share of the tokens that the heads together hold, for which the rules were chosen", gt=0, le=1
    )
    sinks: int = param(64, "first tokens that every head keeps", ge=0)
    recent: int = param(64, "last tokens that every head keeps at least", ge=1)

    tables: ClassVar[tuple[str, ...]] = ("alpha", "beta")
    how: ClassVar[str] = "choose rules with MoA.fit(model, tokenizer)"

    @classmethod
    def fit(
        cls, model: nn.Module, tokenizer: Any = None, *, parameters: dict[str, Any] | None = None, **how: Any
    ) -> Self:
        """Choose the rules of a model's heads; see :func:`vestige.context.plan.rules.choose_rules` for the arguments.

        Args:
            parameters: hyper-parameters of the method (``density``, ``sinks``, ``recent``).
        """
        from vestige.context.plan.rules import choose_rules

        return cast("Self", choose_rules(cls(**(parameters or {})), model, tokenizer, **how))

    @property
    def variant(self) -> str:
        return "" if self.density == HALF else f"-{self.density:g}"

    def on(self, anatomy: Anatomy) -> Self:
        found = None if self.fitted else self.known(anatomy, self.variant) or self.known(anatomy)
        if found is not None and found.density != self.density:
            raise SpecError(
                f"{self.name}: parameter 'density' is {self.density}; the rules known for this model are for "
                f"{found.density}; {self.how}"
            )
        return super().on(anatomy)

    def windows(self, layer: int, seen: int) -> list[int | None]:
        rules = zip(self.alpha[layer], self.beta[layer], strict=True)
        return [window(alpha, beta, seen, self.recent) for alpha, beta in rules]

    def alike(self, layer: int) -> bool:
        return len(set(zip(self.alpha[layer], self.beta[layer], strict=True))) == 1

    def lossless(self, tokens: int) -> Self:
        return self.replace(recent=tokens)
