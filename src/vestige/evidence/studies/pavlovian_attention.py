"""Attention as conditioning: how much a linear-attention head can associate, and what becomes of its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.evidence.report.page import Figure
from vestige.evidence.studies.study import Bench, Finding, Seen, Study
from vestige.layers.ops.recurrence import Drive, recurrence

__all__ = ["PavlovianAttention"]

TOLERATED = 0.5  # squared error, relative to what is retrieved, at which a head counts as full
RULES = ("hebb", "delta")
MEMORIES = 16  # of each trial, for the number that surely fits: it is read off the first key only


class PavlovianAttention(Study):
    """Count what linear attention can hold: associations per key dimension, interference, errors over depth.

    Keys are conditional stimuli, values unconditional ones; a head adds up ``v_i k_i^T`` (Hebb) and a query, the test
    stimulus, reads ``v_j + sum_i (k_i . k_j) v_i``: all other associations disturb it. With random unit keys of *d*
    dimensions the squared error is ``(N - 1) / d``, so that on average a head holds a number that grows with *d*;
    where no read may fail however the disturbances add up, the number grows with the root of *d* only.
    """

    name = "pavlovian-attention"
    paper = Paper(
        title="Understanding Transformers through the Lens of Pavlovian Conditioning",
        year=2025,
        arxiv="2508.08289",
        equations="Hebbian association and retrieval, the capacity theorem, error propagation over layers and heads",
    )
    verdict = Verdict(
        "reproduced",
        "Squared error within 2.4% of (N - 1) / d; the number held grows with the power 0.95 to 0.97 of d, or 0.46 to "
        "0.47 where no read may fail; over 8 layers four heads leave 0.12 to 0.14 of the error of one (3 seeds)",
    )
    FULL = {"widths": (16, 32, 64, 128, 256, 512, 1024), "trials": 128, "layers": 16}  # noqa: RUF012

    widths: tuple[int, ...] = param((16, 32, 64, 128, 256), "key dimensions of a head")
    loads: tuple[float, ...] = param((0.125, 0.25, 0.5, 1.0), "associations stored, per key dimension, rising")
    trials: int = param(32, "memories filled for each point", ge=2)
    layers: int = param(8, "layers that an association passes through", ge=1)
    heads: tuple[int, ...] = param((1, 2, 4), "heads that hold the same associations, rising")
    width: int = param(64, "key dimension of each head where errors pass through layers", ge=2)
    load: float = param(0.25, "associations per key dimension there", gt=0)

    def check(self) -> None:
        for name in ("widths", "loads", "heads"):
            values = getattr(self, name)
            if len(values) < 2 or list(values) != sorted(set(values)) or min(values) <= 0:
                raise SpecError(
                    f"{self.name}: parameter {name!r} is {values!r}; allowed: two or more, positive, rising"
                )
        if min(self.widths) * min(self.loads) < 2 or self.width * self.load < 2:
            raise SpecError(f"{self.name}: parameters 'loads' and 'load' must leave two associations in every width")
        if not min(self.loads) < TOLERATED < max(self.loads):
            raise SpecError(
                f"{self.name}: parameter 'loads' is {self.loads!r}; allowed: some below {TOLERATED}, some above"
            )

    def measure(self, seed: int, bench: Bench) -> Seen:
        """Squared errors by width and load for both rules, both capacities by width, errors by heads and layer."""
        chances = [torch.Generator().manual_seed(1_000_003 * seed + trial) for trial in range(self.trials)]
        errors: dict[str, dict[str, list[float]]] = {rule: {} for rule in RULES}
        average, certain = [], []
        for place, width in enumerate(self.widths):
            bench.tell(0.7 * place / len(self.widths), f"keys of {width} dimensions")
            counts = self._counts(width)
            for rule in RULES:
                errors[rule][str(width)] = [
                    self._mean(chances, bench, partial(_errors, associations=n, width=width, rule=rule)) for n in counts
                ]
            average.append(capacity(counts, errors["hebb"][str(width)], TOLERATED))
            certain.append(self._mean(chances, bench, partial(_certain, width=width)))
        depth = {}
        for heads in self.heads:
            bench.tell(0.8, f"{heads} heads over {self.layers} layers")
            depth[str(heads)] = self._mean(chances, bench, partial(self._through_layers, heads=heads))
        return {"errors": errors, "average": average, "certain": certain, "depth": depth}

    def _counts(self, width: int) -> list[int]:
        return [round(load * width) for load in self.loads]

    def _mean(self, chances: Sequence[torch.Generator], bench: Bench, tried: Callable[[list[Chance]], Tensor]) -> Any:
        """Mean over all trials, ``batch`` of which run together; each has random numbers of its own."""
        found = []
        for first in range(0, len(chances), self.batch):
            found.append(tried([Chance(c, bench.device) for c in chances[first : first + self.batch]]).cpu())
        return torch.cat(found).mean(0).tolist()

    def _through_layers(self, chances: list[Chance], heads: int) -> Float[Tensor, "trials layers"]:
        """Squared errors after each layer: what is read is the query of the next layer, with no cleaning in between."""
        count = round(self.load * self.width)
        item = _units(chances, count, heads, self.width)
        read, errors = item, []
        for _ in range(self.layers):
            following = _units(chances, count, heads, self.width)
            shared = following.flatten(2)[:, :, None].expand(-1, -1, heads, -1)
            read = retrieved(item, shared, read).unflatten(-1, (heads, self.width))
            errors.append((read - following).square().sum((-1, -2)).mean(1) / heads)
            item = following
        return torch.stack(errors, 1)

    def findings(self, seen: Sequence[Seen]) -> tuple[Finding, ...]:
        worst = tuple(
            max(
                abs(sum(one["errors"]["hebb"][str(w)]) / sum(interference(n, w) for n in self._counts(w)) - 1)
                for w in self.widths
            )
            for one in seen
        )
        grown = tuple(
            max(
                abs(error / error_after(round(self.load * self.width), self.width, heads, layer) - 1)
                for heads in self.heads
                for layer, error in enumerate(one["depth"][str(heads)], start=1)
            )
            for one in seen
        )
        few, many = str(self.heads[0]), str(self.heads[-1])
        corrected = tuple(
            max(sum(one["errors"]["delta"][str(w)]) / sum(one["errors"]["hebb"][str(w)]) for w in self.widths)
            for one in seen
        )
        return (
            Finding(
                claim="Every other association disturbs a read: the squared error is (N - 1) / d",
                quantity="largest relative deviation of the error, summed over the loads, at any width",
                measured=worst,
                at_most=0.1,
            ),
            Finding(
                claim="On average a head holds a number of associations that is proportional to its key dimension",
                quantity="exponent of d in the number held at a mean squared error of one half",
                measured=tuple(exponent(self.widths, one["average"]) for one in seen),
                at_least=0.9,
                at_most=1.1,
            ),
            Finding(
                claim="Without any failed read it holds a number that grows with the root of its key dimension",
                quantity="exponent of d in the number held while disturbances cannot outweigh what is read",
                measured=tuple(exponent(self.widths, one["certain"]) for one in seen),
                at_least=0.4,
                at_most=0.6,
            ),
            Finding(
                claim="Errors compound over layers: (1 + (N - 1) / (d H))^L - 1",
                quantity="largest relative deviation from that formula, over layers and heads",
                measured=grown,
                at_most=0.3,
            ),
            Finding(
                claim="Heads that hold the same associations make deep retrieval reliable",
                quantity=f"error after {self.layers} layers with {many} heads, over that with {few}",
                measured=tuple(one["depth"][many][-1] / one["depth"][few][-1] for one in seen),
                at_most=self.heads[0] / self.heads[-1],
            ),
            Finding(
                claim="A learning rule that corrects errors disturbs less than Hebb's",
                quantity="largest squared error of the delta rule over Hebb's, summed over the loads, at any width",
                measured=corrected,
                at_most=0.8,
            ),
        )

    def figures(self, seen: Sequence[Seen]) -> tuple[Figure, ...]:
        from vestige.evidence.report.study_figures import lines

        widths = [float(width) for width in self.widths]
        held = lines(
            {
                "on average": (widths, [one["average"] for one in seen]),
                "without a failed read": (widths, [one["certain"] for one in seen]),
            },
            across="key dimension d",
            up="associations held",
            log="xy",
            predicted={
                "on average": (widths, [1 + TOLERATED * w for w in widths]),
                "without a failed read": (widths, [1 + math.sqrt(math.pi * w / 2) for w in widths]),
            },
        )
        rules = {
            rule: (self.loads, [_mean_of(one["errors"][key].values()) for one in seen])
            for rule, key in (("Hebb's rule", "hebb"), ("delta rule", "delta"))
        }
        due = _mean_of([interference(n, w) for n in self._counts(w)] for w in self.widths)
        disturbed = lines(
            rules,
            across="associations per key dimension, N / d",
            up="squared error of a read",
            predicted={"Hebb's rule": (self.loads, due)},
        )
        layers = list(range(1, self.layers + 1))
        count = round(self.load * self.width)
        deep = lines(
            {f"{h} head{'s' * (h > 1)}": (layers, [one["depth"][str(h)] for one in seen]) for h in self.heads},
            across="layers passed",
            up="squared error",
            log="y",
            predicted={
                f"{h} head{'s' * (h > 1)}": (layers, [error_after(count, self.width, h, n) for n in layers])
                for h in self.heads
            },
        )
        return (
            Figure(
                "capacity",
                held,
                "What a head holds",
                "Both axes are logarithmic: a slope of 1 is proportional growth, of 1/2 growth with the root. Dotted: "
                "the formulas.",
                "Associations held against the key dimension, on average and without a failed read.",
            ),
            Figure(
                "interference",
                disturbed,
                "How much the others disturb",
                f"Mean over key dimensions {', '.join(map(str, self.widths))}. Dotted: (N - 1) / d.",
                "Squared error of a read against the load, for Hebb's rule and the delta rule.",
            ),
            Figure(
                "depth",
                deep,
                "Errors over layers",
                f"{count} associations in heads of {self.width} dimensions; each layer reads with what the one before "
                "gave. Dotted: (1 + (N - 1) / (d H))^L - 1.",
                "Squared error against the number of layers, by the number of heads.",
            ),
        )

    def about(self) -> tuple[str, ...]:
        return (
            "Keys and values are random unit vectors. A head is written to by the library's own linear recurrence, "
            f"and every association is read back with its own key. {self.trials} memories are filled for each point. "
            f"The number held on average is that at which the mean squared error reaches {TOLERATED} of what is "
            "retrieved. The number held without a failed read is that at which the overlaps of the other keys with "
            "the query add up, in size, to what is retrieved: from there on there are values for which the read is "
            "lost.",
            "Over layers, the values of one layer are the keys of the next, every head holds all associations under "
            "keys of its own, and what the heads read is averaged. The formula for the error follows from the same "
            "statistics of random keys; the first release of the paper states the root law, the later one the "
            "proportional law for the average. The delta rule goes over the associations once, with rate 1.",
        )

    def formulas(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "interference": interference,
            "error_after": error_after,
            "capacity": capacity,
            "exponent": exponent,
            "certain": certain_number,
            "hebb": lambda keys, values: _read_back(keys, values, "hebb"),
            "delta": lambda keys, values: _read_back(keys, values, "delta"),
        }


class Chance:
    """One trial's random numbers, drawn where they are the same for every device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def units(self, *shape: int) -> Tensor:
        """Random directions: vectors of length one in the last dimension."""
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (drawn / drawn.norm(dim=-1, keepdim=True)).to(self.device)


def _units(chances: Sequence[Chance], *shape: int) -> Tensor:
    return torch.stack([chance.units(*shape) for chance in chances])


def interference(associations: int, width: int) -> float:
    """Expected squared error of a read by Hebb's rule, random unit keys and values: ``(N - 1) / d``."""
    return (associations - 1) / width


def error_after(associations: int, width: int, heads: int, layers: int) -> float:
    """Expected squared error after layers of heads that each hold everything: ``(1 + (N - 1) / (d H))^L - 1``."""
    return (1 + interference(associations, width) / heads) ** layers - 1


def capacity(counts: Sequence[int], errors: Sequence[float], tolerated: float) -> float:
    """The number of associations at which the error first reaches what is tolerated, on the line between two counts.

    ``nan`` where it is reached at the first count already, or not at all.
    """
    for (n, low), (m, high) in pairwise(zip(counts, errors, strict=True)):
        if low < tolerated <= high:
            return n + (m - n) * (tolerated - low) / (high - low)
    return math.nan


def exponent(widths: Sequence[float], held: Sequence[float]) -> float:
    """The power of the width with which the number held grows: the slope of its logarithm, by least squares."""
    x = [math.log(width) for width in widths]
    y = [math.log(number) for number in held]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def certain_number(keys: Float[Tensor, "... associations dim"]) -> Float[Tensor, ...]:
    """How many associations fit before the overlaps of the others with the first key add up, in size, to one.

    All of them where they never do.
    """
    overlaps = (keys[..., 1:, :] @ keys[..., 0, :, None]).squeeze(-1).abs().cumsum(-1)
    return 1 + (overlaps < 1).sum(-1).to(keys.dtype)


def retrieved(
    keys: Float[Tensor, "trials items heads dim"],
    values: Float[Tensor, "trials items heads out"],
    queries: Float[Tensor, "trials queries heads dim"],
    rate: float | None = None,
) -> Float[Tensor, "trials queries out"]:
    """What queries read when all items are written, averaged over heads; with a rate, by the delta rule."""
    beta = None if rate is None else torch.full_like(keys[..., 0], rate)
    _, state = recurrence(Drive(keys, keys, values, beta=beta))
    return torch.einsum("tqhd,thdo->tqo", queries, state) / keys.shape[2]


def _read_back(keys: Tensor, values: Tensor, rule: str) -> Tensor:
    """What every key of one memory reads, ``(items, out)``."""
    k, v = keys[None, :, None], values[None, :, None]
    return retrieved(k, v, k, None if rule == "hebb" else 1.0)[0]


def _errors(chances: list[Chance], associations: int, width: int, rule: str) -> Float[Tensor, " trials"]:
    """Mean squared error of reading back."""
    keys, values = (_units(chances, associations, 1, width) for _ in range(2))
    read = retrieved(keys, values, keys, None if rule == "hebb" else 1.0)
    return (read - values[:, :, 0]).square().sum(-1).mean(1)


def _certain(chances: list[Chance], width: int) -> Float[Tensor, " trials"]:
    """Mean over several memories per trial of the number that surely fits."""
    return certain_number(_units(chances, MEMORIES, 8 * math.ceil(width**0.5), width)).mean(1)


def _mean_of(rows: Any) -> list[float]:
    return torch.tensor(list(rows), dtype=torch.float64).mean(0).tolist()
