"""Choosing MoA's rules: the least loss of sight under a density, by an integer program."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vestige.context.plan.influence import influence
from vestige.context.plan.passkeys import Sample, check_samples, pass_keys
from vestige.context.plan.windows import fingerprint, window
from vestige.core.anatomy import Anatomy
from vestige.core.packages import need
from vestige.errors import InputError, SpecError, UnsupportedModelError

if TYPE_CHECKING:
    from vestige.context.plan.moa import MoA

__all__ = ["Program", "choose_rules"]

logger = logging.getLogger(__name__)

PARTS = 8  # steps of beta, and of alpha over the longest text
GAP = 5e-3  # how far, as a part, a choice may be from the best
POINTS = 5  # bounds put on each further objective


def choose_rules(
    method: MoA,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    samples: Mapping[int, Sequence[Sample]] | Sequence[Sample] | None = None,
    lengths: Sequence[int] | None = None,
    texts: int = 4,
    rules_per_layer: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MoA:
    """Profile a model's heads at several lengths of text, and choose a rule for each under the method's density.

    Candidates are windows of alpha + beta *N* tokens, alpha in eighths of the longest length (from minus two eighths
    on) and beta in eighths, those that stay within the longest text and one twice as long. The density is kept at
    every length profiled and at twice the longest. Minimising the loss at the longest length under bounds on the
    others gives plans between which no length's loss can be lowered but by raising another's. Of those the one with
    the least sum of losses is taken, each as a part of what the narrowest windows would cost. (The authors take the
    one that does best on texts of another length.)

    Args:
        method: what to choose rules for: its ``density``, ``sinks`` and ``recent``.
        tokenizer: of the model, to write texts with pass keys (:func:`~vestige.context.plan.passkeys.pass_keys`).
        samples: texts to profile on instead; those of one length are taken together.
        lengths: tokens of the texts written; by default three, each twice the one before, as far as the model reads.
        texts: how many texts of each length are written.
        rules_per_layer: how many different rules a layer may have (the authors' kernels: 2, which makes the choice
            much slower); ``None`` for as many as heads, which storage per head allows.
        progress: called with the number of lengths profiled, and of all.

    Raises:
        SpecError: a parameter out of range, or a density below what the narrowest windows hold.
        InputError: neither tokenizer nor samples, or texts too short for windows to matter or too long for the model.
        UnsupportedModelError: the model is no causal language model that Vestige knows.
        MissingPackageError: scipy is absent.
    """
    need("choosing rules by an integer program", "plan", "scipy")
    anatomy = Anatomy.of(model)
    if not anatomy.causal or anatomy.head is None:
        raise UnsupportedModelError(f"{method.name} needs a causal language model; {anatomy.architecture} is none")
    if texts < 1 or (rules_per_layer is not None and rules_per_layer < 1):
        raise SpecError(f"{method.name}: 'texts' is {texts!r}, 'rules_per_layer' is {rules_per_layer!r}; allowed: >= 1")
    least = method.sinks + method.recent
    by_length = _by_length(method, anatomy, tokenizer, samples, lengths, texts, seed, least)
    profiles = {}
    for done, (length, chosen) in enumerate(sorted(by_length.items()), 1):
        profiles[length] = influence(model, chosen, method.sinks, owner=f"{method.name} fit").cpu()
        if progress is not None:
            progress(done, len(by_length))
    program = Program.of(method, profiles, rules_per_layer)
    rules = program.best()
    alpha, beta = (tuple(tuple(float(rule[part]) for rule in row) for row in rules) for part in (0, 1))
    return method.replace(alpha=alpha, beta=beta, fitted_on=fingerprint(anatomy))


def _by_length(
    method: MoA,
    anatomy: Anatomy,
    tokenizer: Any,
    samples: Mapping[int, Sequence[Sample]] | Sequence[Sample] | None,
    lengths: Sequence[int] | None,
    texts: int,
    seed: int,
    least: int,
) -> dict[int, list[Sample]]:
    """The texts to profile on, by their length."""
    if samples is None:
        if tokenizer is None:
            raise InputError(f"{method.name}: fitting needs a tokenizer to write texts with, or samples")
        lengths = lengths or [
            length for length in (4 * least, 8 * least, 16 * least) if length <= anatomy.max_positions
        ]
        if not lengths or min(lengths) <= least:
            raise InputError(
                f"{method.name}: texts of {min(lengths, default=anatomy.max_positions)} tokens are too short: the "
                f"narrowest window already holds sinks + recent = {least}"
            )
        written = (pass_keys(tokenizer, [length], seed=seed) for length in lengths)
        samples = [sample for stream in written for sample in itertools.islice(stream, texts)]
    every = list(itertools.chain(*samples.values())) if isinstance(samples, Mapping) else list(samples)
    check_samples(every, anatomy, least, f"the narrowest window would hold all of it ({least} tokens)")
    found: dict[int, list[Sample]] = {}
    for sample in every:
        found.setdefault(len(sample.ids), []).append(sample)
    return found


@dataclass(frozen=True)
class Program:
    """The choice of one rule for each head.

    Attributes:
        rules: candidates (alpha, beta).
        losses: per length ``(heads, rules)``, as parts of the loss under the narrowest windows.
        densities: ``(lengths, rules)`` share of the tokens that a head holds by each rule.
        layers: how many layers the heads are of, in their order.
        density: what the heads may hold together.
        rules_per_layer: how many rules a layer may have, or ``None``.
    """

    rules: tuple[tuple[int, float], ...]
    losses: tuple[np.ndarray, ...]
    densities: np.ndarray
    layers: int
    density: float
    rules_per_layer: int | None

    @classmethod
    def of(cls, method: MoA, profiles: Mapping[int, torch.Tensor], rules_per_layer: int | None = None) -> Program:
        """The program for influences by distance, ``(layers, kv_heads, distance)`` for each length.

        Raises:
            SpecError: the narrowest windows hold more than the density.
        """
        lengths = [*sorted(profiles), 2 * max(profiles)]
        rules = _candidates(lengths, method.recent)
        held = np.array([[_held(method, rule, n) / n for rule in rules] for n in lengths])
        if held.min(axis=1).max() > method.density:
            raise SpecError(
                f"{method.name}: parameter 'density' is {method.density}; of texts of {min(lengths)} tokens, sinks + "
                f"recent are {held.min(axis=1).max():.3f}: take a higher density, longer texts or narrower windows"
            )
        losses = []
        for n in sorted(profiles):
            lost = profiles[n].double().flatten(0, 1).flip(1).cumsum(dim=1).flip(1)  # at a distance or farther
            windows = [window(*rule, n, method.recent) for rule in rules]
            columns = [lost[:, w] if w is not None and w < n else torch.zeros(len(lost)) for w in windows]
            loss = torch.stack([column.double() for column in columns], dim=1).numpy()
            losses.append(loss / max(float(loss.max(axis=1).sum()), 1e-30))
        layers = next(iter(profiles.values())).shape[0]
        return cls(rules, tuple(losses), held, layers, method.density, rules_per_layer)

    def best(self) -> list[list[tuple[int, float]]]:
        """The rule of each layer's heads: of the plans on the front, that with the least sum of losses."""
        plans = self.front()
        logger.info("%d plans; losses %s", len(plans), [[round(x, 4) for x in self._losses_of(plan)] for plan in plans])
        plan = min(plans, key=lambda chosen: sum(self._losses_of(chosen)))
        heads = len(plan) // self.layers
        return [[self.rules[r] for r in plan[heads * layer : heads * (layer + 1)]] for layer in range(self.layers)]

    def front(self) -> list[tuple[int, ...]]:
        """Plans (a rule's number for each head) found by minimising the loss at the longest length under bounds on the
        others, and the sum of all."""
        *others, main = range(len(self.losses))
        alone = {length: self.solve(self.losses[length]) for length in (*others, main)}
        plans = {*alone.values(), self.solve(sum(self.losses))}
        ranges = []
        for length in others:
            low = self._losses_of(alone[length])[length]
            high = self._losses_of(alone[main])[length]
            ranges.append(np.linspace(low, max(low, high), POINTS))
        for bounds in itertools.product(*ranges) if others else ():
            plan = self.solve(self.losses[main], dict(zip(others, bounds, strict=True)))
            if plan is not None:
                plans.add(plan)
        return sorted(plan for plan in plans if plan is not None)

    def solve(self, loss: Any, bounds: Mapping[int, float] | None = None) -> tuple[int, ...] | None:
        """The plan of least loss under the density, the losses at some lengths bounded; ``None`` if there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, eye_array, hstack, kron, vstack

        heads, rules = loss.shape
        limited = self.rules_per_layer is not None and self.rules_per_layer < heads // self.layers
        marks = self.layers * rules if limited else 0  # whether a layer uses a rule

        def row(values: np.ndarray) -> Any:
            return coo_array(np.concatenate([values.ravel(), np.zeros(marks)])[None])

        one_each = hstack([kron(eye_array(heads), np.ones((1, rules))), coo_array((heads, marks))])
        constraints = [LinearConstraint(one_each, 1, 1)]
        for held in self.densities:
            constraints.append(LinearConstraint(row(np.tile(held / heads, heads)), -np.inf, self.density))
        for length, most in (bounds or {}).items():
            constraints.append(LinearConstraint(row(self.losses[length]), -np.inf, most * (1 + 1e-9) + 1e-12))
        if limited:
            per_layer = heads // self.layers
            used = kron(eye_array(self.layers), kron(np.ones((per_layer, 1)), eye_array(rules)))
            constraints.append(LinearConstraint(hstack([eye_array(heads * rules), -used]), -np.inf, 0))
            count = hstack([coo_array((self.layers, heads * rules)), kron(eye_array(self.layers), np.ones((1, rules)))])
            constraints.append(LinearConstraint(vstack([count]), -np.inf, self.rules_per_layer))
        found = milp(
            np.concatenate([np.asarray(loss).ravel(), np.zeros(marks)]),
            integrality=np.ones(heads * rules + marks),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            return None
        return tuple(found.x[: heads * rules].reshape(heads, rules).argmax(axis=1).tolist())

    def _losses_of(self, plan: tuple[int, ...] | None) -> list[float]:
        assert plan is not None
        return [float(loss[np.arange(len(plan)), plan].sum()) for loss in self.losses]


def _candidates(lengths: Sequence[int], least: int) -> tuple[tuple[int, float], ...]:
    """Rules that stay within the longest two lengths and above the narrowest window at the shortest; and the
    narrowest itself."""
    unit = lengths[-2] / PARTS
    pairs = [(round(a * unit), b / PARTS) for a in range(-2, PARTS + 1) for b in range(PARTS + 1)]
    fit = [(a, b) for a, b in pairs if all(a + b * n <= n for n in lengths[-2:]) and a + b * lengths[0] > least]
    return ((least, 0.0), *fit)


def _held(method: MoA, rule: tuple[int, float], seen: int) -> int:
    """Entries that a head holds by a rule."""
    recent = window(*rule, seen, method.recent)
    return seen if recent is None else min(seen, method.sinks + recent)
