"""Which method under this memory? Answered from what was measured, with how sure that is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.evidence.amounts import Amount, size
from vestige.evidence.ledgers import read_ledgers
from vestige.evidence.points import Point, better, difference, points_of, shown
from vestige.evidence.statistics import Interval

__all__ = ["Recommendation", "recommend"]

QUICK: dict[str, Any] = {
    "methods": ("streaming-llm", "h2o", "a2sf", {"name": "snapkv", "window_size": 32}),
    "seeds": (0, 1, 2),
    "examples": 4,
    "timed": 8,
}
"""What is compared where nothing has been measured."""
USES = {
    "attach": "{}.attach(model)",
    "build": "vestige.models.VestigeConfig(blocks=[{}])",
    "erase": "{}.erase(model, forget=..., retain=...)",
    "run_state": "vestige.weights.retain.ContinualTrainer(model, {})",
}
"""What is done with a method, by the verb that its family has."""
QUICK_LENGTH = 256  # tokens of the contexts of that comparison


@dataclass(frozen=True)
class Recommendation:
    """A method, and what speaks for it.

    Attributes:
        point: what was measured of it.
        allowed: bytes per context that were asked for.
        full: what the full cache is worth, where it was measured.
        runner_up: the next best within the bytes, of another method; ``None`` where there is none.
        lead: how much better than the runner-up, on the same examples, with its 95% interval.
        considered: points that fit.
        length: tokens of the contexts on which it was measured.
    """

    point: Point
    allowed: float
    full: Point | None
    runner_up: Point | None
    lead: Interval | None
    considered: int
    length: int

    @property
    def resolved(self) -> bool | None:
        """Whether the lead over the runner-up is more than chance; ``None`` without a runner-up."""
        return None if self.lead is None else self.lead.low > 0

    @property
    def command(self) -> str:
        """How it is used."""
        spec = {name: value for name, value in self.point.spec.items() if name != "name"}
        parameters = "".join(
            f", {name}={value!r}" for name, value in spec.items() if name == "budget" or self._set(name)
        )
        built = f"vestige.method({self.point.spec['name']!r}{parameters})"
        return self._form.format(built)

    @property
    def _form(self) -> str:
        """How a method of this kind is used; as a policy is where a ledger names what is not known here."""
        from vestige.core.registry import registry

        try:
            known = registry.load(self.point.spec["name"])
        except SpecError:
            return USES["attach"]
        return next((form for verb, form in USES.items() if hasattr(known, verb)), "{}")

    def _set(self, name: str) -> bool:
        """Whether a parameter is not at its default."""
        from vestige.core.registry import registry

        default = registry.load(self.point.spec["name"]).parameters().get(name, {}).get("default")
        return bool(self.point.spec[name] != default)

    def summary(self) -> dict[str, Any]:
        """The answer as plain JSON types."""
        found = self.point.interval
        return {
            "model": self.point.model,
            "task": self.point.task,
            "metric": self.point.metric,
            "method": dict(self.point.spec),
            "use": self.command,
            "value": found.value,
            "interval": [found.low, found.high],
            "examples": found.count,
            "seeds": self.point.seeds,
            "kv_bytes": self.point.kv_bytes,
            "allowed_bytes": self.allowed,
            "seconds_per_token": self.point.seconds_per_token,
            "full": None if self.full is None else self.full.value,
            "runner_up": None if self.runner_up is None else dict(self.runner_up.spec),
            "lead": None if self.lead is None else [self.lead.value, self.lead.low, self.lead.high],
            "resolved": self.resolved,
            "rows": list(self.point.keys),
        }

    def __str__(self) -> str:
        point, metric = self.point, self.point.metric
        at = f" at {point.budget}" if point.budget else ""
        lines = [
            f"{point.method}{at}: {point.value_text} {metric} on {point.task} with {point.model}",
            f"  {self.command}",
            f"  holds {point.bytes_text} for a context of {self.length:,} tokens; {size(self.allowed)} are allowed"
            + (f"; {point.time_text} ms per token ({point.machine})" if point.time_text else ""),
            f"  {len(point.values)} examples, {point.seeds} {'seed' if point.seeds == 1 else 'seeds'}"
            + ("" if self.full is None else f"; the full cache: {self.full.value_text}, {self.full.bytes_text}"),
        ]
        if self.runner_up is None or self.lead is None:
            lines.append("  nothing else that was measured fits")
        else:
            names = f"{self.runner_up.method} ({shown(self.runner_up.value, metric)}, {self.runner_up.bytes_text})"
            value, low, high = (_signed(n, metric) for n in (self.lead.value, self.lead.low, self.lead.high))
            lead = f"{value} ({low} to {high})"
            verdict = (
                f"resolved: ahead of {names} by {lead}"
                if self.resolved
                else f"not resolved: its lead over {names} is {lead}; more seeds or examples would tell"
            )
            lines.append(f"  {verdict}")
        return "\n".join(lines)


def recommend(
    model: Any = "smollm2",
    *,
    memory: str | int | float | None = None,
    budget: str | float | None = None,
    task: str = "needle",
    contexts: int = 1,
    length: int | None = None,
    ledgers: Iterable[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] = "vestige-compare",
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> Recommendation:
    """Name the method that is best on a task within the memory for the cache.

    The measurements come from ledgers of comparisons; without one a quick comparison at the budget is run (and kept in
    ``out``, so that the next question is answered from it).

    Args:
        model: as in the ledger; for a quick comparison also a pair of model and tokenizer.
        memory: for the cache of all contexts: ``"4GB"``, or a number of bytes.
        budget: in its place a share of what the full cache takes: ``0.1``, ``"10%"``.
        task: its name; with several of that name the ledger must hold only one, or ``length`` chooses.
        contexts: that are held at the same time and share ``memory``.
        length: tokens of a context. Memory is scaled to the contexts that were measured: of ``4GB`` for contexts of
            16k tokens, those of 1k may use a sixteenth. Default: as measured.
        ledgers: files or folders.
        out: folder of the quick comparison.
        device: of the quick comparison, such as ``"cuda"``.
        dtype: of the quick comparison, such as ``"bfloat16"``.
        progress: show the progress of the quick comparison.

    Raises:
        SpecError: neither or both of ``memory`` and ``budget``, a model or task that the ledgers do not hold (with
            those that they do), or nothing measured fits.
    """
    asked = _asked(memory, budget, contexts)
    name = model if isinstance(model, str) else None
    paths = list(ledgers)
    rows: Sequence[Mapping[str, Any]]
    if paths:
        rows = read_ledgers(paths).rows
    else:
        from vestige.evidence.compare import compare

        share = asked if asked.unit == "share" else _share_of(model, asked, length, device, dtype)
        chosen: dict[str, Any] = {
            "tasks": {"name": task, "length": QUICK_LENGTH},
            "budgets": share,
            "device": device,
            "dtype": dtype,
        }
        found = compare(models=model, out=Path(out), progress=progress, **QUICK, **chosen)
        rows, name = found.rows, None
        asked = share
    points = _chosen(points_of(rows).all, name, task, None if not paths else length)
    measured = points[0].length
    whole = next((point for point in points if point.method == "full"), None)
    if asked.unit == "share":
        if whole is None:
            raise SpecError("the ledger holds no full cache to take a share of; give memory in bytes")
        allowed = asked.value * whole.kv_bytes
    else:
        allowed = asked.value * (measured / length if length else 1)
    fitting = sorted((p for p in points if p.kv_bytes <= allowed * (1 + 1e-9)), key=lambda p: (-better(p), p.kv_bytes))
    if not fitting:
        least = min(points, key=lambda point: point.kv_bytes)
        raise SpecError(
            f"nothing that was measured fits into {size(allowed)} per context of {measured:,} tokens; the smallest is "
            f"{least.method}{f' at {least.budget}' if least.budget else ''} with {least.bytes_text}"
        )
    best = fitting[0]
    second = next((point for point in fitting if point.method != best.method), None)
    lead = None if second is None else difference(best, second)
    return Recommendation(best, allowed, whole, second, lead, len(fitting), measured)


def _asked(memory: Any, budget: Any, contexts: int) -> Amount:
    """What each context may use."""
    if (memory is None) == (budget is None):
        raise SpecError("give either memory, as in 4GB, or budget, as in 0.1")
    if type(contexts) is not int or contexts < 1:
        raise SpecError(f"contexts is {contexts!r}; allowed: int >= 1")
    if budget is not None:
        amount = Amount.of(float(budget) if not isinstance(budget, str) or "%" not in budget else budget)
        return amount
    if isinstance(memory, int | float) and not isinstance(memory, bool) and memory > 0:
        amount = Amount(float(memory), "bytes")
    else:
        amount = Amount.of(memory)
    if amount.unit != "bytes":
        raise SpecError(f"memory is {memory!r}; allowed: bytes, as in 512MB or 4GB")
    return Amount(amount.value / contexts, "bytes")


def _share_of(model: Any, asked: Amount, length: int | None, device: str, dtype: str) -> Amount:
    """The share of the full cache that an amount of memory is, for contexts of a length."""
    if length is None:
        raise SpecError("without a ledger, memory needs the length of the contexts that it is for (length=…)")
    from vestige.core.anatomy import Anatomy
    from vestige.evidence.engine.bench import load_pair

    network = load_pair(model, dtype, device)[1]
    whole = Anatomy.of(network).cache_bytes_per_token() * length
    return Amount(min(1.0, asked.value / whole), "share")


def _chosen(points: Sequence[Point], model: str | None, task: str, length: int | None) -> list[Point]:
    """The points of one model and task.

    Raises:
        SpecError: there are none, or of several tasks.
    """
    from vestige.core.spec import did_you_mean

    models = {point.model for point in points}
    if model is not None and model not in models:
        raise SpecError(f"the ledger holds no points of the model {model!r}; {did_you_mean(model, models)}")
    own = [point for point in points if model in (None, point.model)]
    tasks = {point.task.partition(" ")[0] for point in own}
    if task not in tasks:
        raise SpecError(f"the ledger holds nothing of the task {task!r}; {did_you_mean(task, tasks)}")
    own = [point for point in own if point.task.partition(" ")[0] == task]
    kinds = list(dict.fromkeys(point.task for point in own))
    if len(kinds) > 1:
        near = [kind for kind in kinds if length is not None and _first(own, kind).length == length]
        if len(near) != 1:
            raise SpecError(f"the ledger holds several tasks of that name: {'; '.join(kinds)}; choose by length")
        kinds = near
    return [point for point in own if point.task == kinds[0]]


def _first(points: Sequence[Point], task: str) -> Point:
    return next(point for point in points if point.task == task)


def _signed(value: float, metric: str) -> str:
    text = shown(value, metric)
    return text if value < 0 else f"+{text}"
