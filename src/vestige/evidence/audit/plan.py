"""What an audit measures, checked before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vestige.errors import SpecError, UnsupportedModelError
from vestige.evidence.budgets import at, evicts, label
from vestige.evidence.tasks.haystack import GRAMMAR
from vestige.evidence.tasks.needle import Needle

if TYPE_CHECKING:
    from vestige.context.policy import CachePolicy
    from vestige.core.anatomy import Anatomy
    from vestige.evidence.probes.retrieval_heads import RetrievalHeads

__all__ = ["AuditPlan", "plan_audit"]

METHODS = ("full", "streaming-llm", "h2o", "a2sf")
ALL = "all"  # in the place of a name: every policy that can be built without being told anything

# Settings of the plain audit and of the quick one: about two minutes and half a minute on two cores.
_DEFAULTS: dict[str, Any] = {
    "budgets": (64, 128, 256, 384, 448, 480),
    "length": 512,
    "depths": (0.1, 0.3, 0.5, 0.7, 0.9),
    "seeds": (0, 1),
    "heads": {"lengths": (256,), "depths": (0.2, 0.8), "seeds": (0, 1)},
    "sinks": 2,
    "decode_tokens": 24,
}
_QUICK: dict[str, Any] = {
    "budgets": (64, 128, 192, 240),
    "length": 256,
    "seeds": (0,),
    "heads": {"lengths": (192,), "depths": (0.2, 0.8), "seeds": (0,)},
    "sinks": 1,
    "decode_tokens": 12,
}


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What an audit measures: validated, before any model is loaded. Made by :func:`plan_audit`.

    Attributes:
        policies: the cache policies, the full cache first.
        budgets: entries kept per head, ascending.
        length: tokens of each context.
        depths: where the needle stands in it.
        seeds: of the prompts.
        haystack: the filler text.
        heads: the probe of the retrieval heads.
        sinks: needles whose prompts the sink share is averaged over.
        decode_tokens: tokens that are decoded to measure time.
        batch: prompts that run together.
        optional: policies that nobody named: they are left out where the model will not do for them.
    """

    policies: tuple[CachePolicy, ...]
    budgets: tuple[int, ...]
    length: int
    depths: tuple[float, ...]
    seeds: tuple[int, ...]
    haystack: str
    heads: RetrievalHeads
    sinks: tuple[Needle, ...]
    decode_tokens: int
    batch: int
    optional: frozenset[CachePolicy] = frozenset()

    def on(self, anatomy: Anatomy) -> AuditPlan:
        """The plan for a model.

        Raises:
            SpecError, UnsupportedModelError: a policy that was named cannot serve it.
        """
        serve = []
        for policy in self.policies:
            try:
                policy.on(anatomy).check_model(anatomy)
                serve.append(policy)
            except (SpecError, UnsupportedModelError):
                if policy not in self.optional:
                    raise
        return dataclasses.replace(self, policies=tuple(serve))

    def needles(self) -> list[Needle]:
        """The prompts that every policy is asked about: each depth with each seed."""
        return [
            # Prompts of different depths hide different facts, so that no cell is another one's repetition.
            Needle(length=self.length, depth=depth, seed=1000 * seed + place, haystack=self.haystack)
            for seed in self.seeds
            for place, depth in enumerate(self.depths)
        ]

    def budgets_of(self, policy: CachePolicy) -> tuple[int, ...]:
        """The budgets a policy is measured at: those that hold what it always keeps; one that keeps every entry has
        only the whole length."""
        return tuple(b for b in self.budgets if _holds(policy, b)) if evicts(policy) else (self.length,)

    @property
    def timed_budget(self) -> int:
        """The budget at which time per token is measured: the middle one."""
        return self.budgets[(len(self.budgets) - 1) // 2]

    def command(self, model: str) -> str:
        """The command that repeats the audit."""
        words = ["vestige", "audit", model]
        words += ["--methods", ",".join(dict.fromkeys(p.name for p in self.policies))]
        words += ["--budgets", ",".join(map(str, self.budgets)), "--length", str(self.length)]
        words += [
            "--depths",
            ",".join(f"{depth:g}" for depth in self.depths),
            "--seeds",
            ",".join(map(str, self.seeds)),
        ]
        if self.haystack != GRAMMAR:
            words += ["--haystack", self.haystack]
        return " ".join(words)


def plan_audit(
    *,
    methods: Iterable[str | Mapping[str, Any] | CachePolicy] | None = None,
    budgets: Iterable[int | float] | None = None,
    length: int | None = None,
    depths: Iterable[float] | None = None,
    seeds: int | Iterable[int] | None = None,
    haystack: str = GRAMMAR,
    batch: int = 5,
    quick: bool = False,
) -> AuditPlan:
    """Check the settings of an audit; what is not given is chosen. See :func:`audit` for their meaning.

    Raises:
        SpecError: a setting is unknown or out of range.
        InputError: the haystack's file cannot be used.
    """
    chosen = _DEFAULTS | (_QUICK if quick else {})
    length = chosen["length"] if length is None else length
    depths = tuple(chosen["depths"] if depths is None else depths)
    seeds = tuple(range(seeds) if type(seeds) is int else chosen["seeds"] if seeds is None else seeds)  # type: ignore[arg-type]
    for name, values in (("depths", depths), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise SpecError(f"audit: parameter {name!r} is {values!r}; allowed: one or more different values")
    for depth in depths:
        for seed in seeds:
            Needle(length=length, depth=depth, seed=seed, haystack=haystack)
    if type(batch) is not int or batch < 1:
        raise SpecError(f"audit: parameter 'batch' is {batch!r}; allowed: int >= 1 (prompts)")
    given = budgets if budgets is not None else [b for b in chosen["budgets"] if b <= length] or (0.25, 0.5)
    tokens = _budgets(given, length)
    named, optional = _policies(METHODS if methods is None else methods, tokens)
    from vestige.evidence.probes.retrieval_heads import RetrievalHeads

    probe = RetrievalHeads(**chosen["heads"], haystack=haystack, batch=batch)
    if probe.lengths[0] > length:
        probe = probe.replace(lengths=(length,))
    sinks = [Needle(length=length, seed=seed, haystack=haystack) for seed in range(chosen["sinks"])]
    return AuditPlan(
        policies=named + optional,
        optional=frozenset(optional),
        budgets=tokens,
        length=length,
        depths=depths,
        seeds=seeds,
        haystack=haystack,
        heads=probe,
        sinks=tuple(sinks),
        decode_tokens=chosen["decode_tokens"],
        batch=batch,
    )


def _policies(
    methods: Iterable[str | Mapping[str, Any] | CachePolicy], budgets: tuple[int, ...]
) -> tuple[tuple[CachePolicy, ...], tuple[CachePolicy, ...]]:
    """The policies named, the full cache first, and those that ``"all"`` adds; each only once.

    Raises:
        SpecError: one that is named cannot be built, or a budget is too small for what it always keeps. Of ``"all"``
            those that cannot be measured at any of the budgets are left out.
    """
    from vestige.context.policy import CachePolicy

    if isinstance(methods, str):
        raise SpecError(f"audit: parameter 'methods' is {methods!r}; allowed: a list of names, specs or policies")
    methods, chosen = list(methods), [CachePolicy.from_spec("full")]
    for method in methods:
        if method == ALL:
            continue
        policy = method if isinstance(method, CachePolicy) else CachePolicy.from_spec(method)  # type: ignore[arg-type]
        for budget in budgets if evicts(policy) else ():  # type: ignore[arg-type]
            at(policy, budget)  # type: ignore[arg-type]
        chosen.append(policy)  # type: ignore[arg-type]
    named = {label(policy): policy for policy in chosen}  # type: ignore[arg-type]
    others = _all() if ALL in methods else []
    possible = (p for p in others if not evicts(p) or any(_holds(p, budget) for budget in budgets))
    return tuple(named.values()), tuple(policy for policy in possible if label(policy) not in named)  # type: ignore[arg-type]


def _all() -> list[CachePolicy]:
    """Every registered cache policy, with the parameters that it has by default."""
    from vestige.context.policy import CachePolicy
    from vestige.core.registry import registry

    found = []
    for card in registry.cards():
        if card.room == "context" and issubclass(cls := registry.load(card.name), CachePolicy):
            with contextlib.suppress(SpecError):  # it has to be told something
                found.append(cls())
    return found


def _holds(policy: CachePolicy, budget: int) -> bool:
    """Whether a budget is large enough for what the policy always keeps."""
    try:
        at(policy, budget)
    except SpecError:
        return False
    return True


def _budgets(budgets: Iterable[int | float], length: int) -> tuple[int, ...]:
    """Budgets in tokens, ascending, each once."""
    from vestige.context.cache import budget_tokens

    given = [budgets] if isinstance(budgets, int | float) else list(budgets)
    if not given:
        raise SpecError("audit: parameter 'budgets' is empty; at least one value is needed")
    for budget in given:
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if not number or not (1 <= budget <= length if isinstance(budget, int) else 0 < budget <= 1):
            raise SpecError(
                f"audit: parameter 'budgets' holds {budget!r}; allowed: tokens from 1 to the context's {length} (int), "
                "or shares above 0 and up to 1.0 (float)"
            )
    return tuple(sorted({budget_tokens(budget, length) for budget in given}))
