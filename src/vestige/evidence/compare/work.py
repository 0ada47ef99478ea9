"""The work itself: a model, and the cells that are measured with it. One worker has one model at a time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vestige.context.cache import budget_tokens
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import InputError, SpecError
from vestige.evidence.amounts import Amount
from vestige.evidence.budgets import at, evicts
from vestige.evidence.compare.context import ContextCell, ContextJob, Facts, Way
from vestige.evidence.compare.plan import scored
from vestige.evidence.engine.bench import given, load_pair, now, time_policy
from vestige.evidence.engine.reading import read

__all__ = ["Worker"]

PROBE = 128  # tokens of the text on which the speed of reading is seen


class Worker:
    """Measures cells.

    Args:
        pairs: models that are there already, by name, with their tokenizers; others are loaded when they are needed.
    """

    def __init__(self, pairs: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        self.pairs = dict(pairs or {})
        self._held: tuple[Any, Any, Any] | None = None  # what was asked for, the model, its tokenizer
        self._given: dict[str, str] = {}
        self._entries: dict[Any, int] = {}

    def facts(self, model: str, dtype: str, device: str) -> Facts:
        """What is to be known of a model.

        Raises:
            ModelError: it cannot be loaded.
            UnsupportedModelError: it is no causal decoder that Vestige knows.
        """
        network, _ = self._model(model, dtype, device)
        anatomy = Anatomy.of(network)
        anatomy.need_causal("a comparison")
        ids = self._text(network, min(PROBE, anatomy.max_positions))
        with torch.inference_mode():
            for _ in range(2):  # the first pass of a process is slower than the rest
                began = now(network.device)
                network(ids, use_cache=True, logits_to_keep=1)
                seconds = now(network.device) - began
        return Facts(
            given=self._given,
            max_positions=anatomy.max_positions,
            cache_bytes_per_token=anatomy.cache_bytes_per_token(),
            seconds_per_token=seconds / ids.shape[1],
        )

    def run(self, job: ContextJob) -> list[dict[str, Any]]:
        """The rows of a job's cells. One that fails has a row with its error, and the others are measured."""
        try:
            return self._measure(job)
        except Exception as error:
            self._recover()
            if len(job.cells) == 1:
                return [job.cells[0].failed(error)]
            return [row for cell in job.cells for row in self.run(ContextJob(cells=(cell,)))]

    def _measure(self, job: ContextJob) -> list[dict[str, Any]]:
        way, task = job.way, job.cells[0].task
        network, tokenizer = self._model(job.cells[0].model, way.dtype, way.device)
        examples = task.examples(tokenizer, seed=job.cells[0].seed, count=way.examples)
        settled = self._settle(network, job)
        began = time.perf_counter()
        scores = task.scores(
            network,
            examples,
            settled,
            batch_size=way.batch,
            question_known=way.question_known,
            decode_tokens=way.timed,
        )
        seconds = (time.perf_counter() - began) / len(settled)
        rows = []
        for cell, (policy, entries), score in zip(job.cells, settled, scores, strict=True):
            timed = {
                "prefill_seconds": score.prefill_seconds,
                "decode_seconds_per_token": score.decode_seconds_per_token,
            }
            rows.append(
                cell.on(self._given).row(
                    metrics={score.metric: score.value, **{k: v for k, v in timed.items() if v is not None}},
                    kv_bytes=score.kv_bytes,
                    seconds=seconds,
                    scored=scored(task, score),
                )
                | {"method": (policy if entries is None else at(policy, entries)).spec()}
            )
        return rows

    def _recover(self) -> None:
        """After a failure: no policy stays attached, and memory that is not used goes back."""
        if self._held is not None and Patch.active(self._held[1]):
            self._held = None  # what cannot be trusted any more is loaded anew
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _model(self, name: str, dtype: str, device: str) -> tuple[Any, Any]:
        wanted = (name, dtype, device)
        if self._held is None or self._held[0] != wanted:
            self._held = None
            gc.collect()
            _, network, tokenizer = load_pair(self.pairs.get(name, name), dtype, device)
            self._held, self._given = (wanted, network, tokenizer), given(network)
        return self._held[1], self._held[2]

    # What a budget is in a method's own terms.

    def _settle(self, network: Any, job: ContextJob) -> list[tuple[CachePolicy, int | None]]:
        """The policy of each cell, and the entries that its budget comes to."""
        budgeted = {self._settled(cell, job.way): cell for cell in job.cells if cell.budget is not None}
        missing = {known: cell for known, cell in budgeted.items() if known not in self._entries}
        if missing and job.way.equal == "bytes":
            self._entries |= self._entries_in_bytes(network, missing)
        for known, cell in missing.items():
            if job.way.equal == "entries":
                assert cell.budget is not None
                share = cell.budget.unit == "share"
                asked = cell.budget.value if share else int(cell.budget.value)
                self._entries[known] = budget_tokens(asked, cell.task.length)
            elif job.way.equal == "time":
                assert cell.budget is not None
                self._entries[known] = self._entries_in_time(
                    network, cell.method, cell.budget, cell.task.length, max(1, job.way.timed)
                )
        return [self._with_entries(cell, self._entries.get(self._settled(cell, job.way))) for cell in job.cells]

    def _settled(self, cell: ContextCell, way: Way) -> Any:
        """What the entries of a cell depend on."""
        return (self._given["weights"], cell.method, cell.budget, cell.task.length, way.equal)

    def _with_entries(self, cell: ContextCell, entries: int | None) -> tuple[CachePolicy, int | None]:
        if entries is None or evicts(cell.method):
            return cell.method, entries
        return cell.method.replace(budget=entries), None

    def _entries_in_bytes(self, network: Any, cells: Mapping[Any, ContextCell]) -> dict[Any, int]:
        """The most entries whose bytes each budget allows, by cutting the cache of one reading.

        Raises:
            InputError: a budget does not allow a single one.
        """
        found: dict[Any, int] = {}
        length = next(iter(cells.values())).task.length
        whole = Anatomy.of(network).cache_bytes_per_token() * length
        methods = tuple(dict.fromkeys(cell.method for cell in cells.values()))
        with read(network, methods, self._text(network, length)) as reading:
            for known, cell in cells.items():
                assert cell.budget is not None
                place = methods.index(cell.method)

                def held(entries: int, place: int = place) -> int:
                    try:
                        return reading.cache(place, entries).nbytes
                    except SpecError:  # fewer than the method must have; if it comes to that, the cell says so
                        return 0

                allowed = cell.budget.value * (whole if cell.budget.unit == "share" else 1)
                found[known] = most_within(held, allowed, length)
                if not found[known]:
                    least = Amount(allowed, "bytes")
                    raise InputError(f"{cell.method.name} holds more than {least} with a single entry per head")
        return found

    def _entries_in_time(self, network: Any, method: CachePolicy, budget: Amount, length: int, timed: int) -> int:
        """The largest cache whose tokens are decoded in time, between measured sizes on a straight line."""
        ids = self._text(network, length)

        def seconds(entries: int) -> float:
            used = method.with_budget(entries) if evicts(method) else method.replace(budget=entries)
            return statistics.median(time_policy(network, used, ids, timed)[1])

        allowed = budget.value
        if budget.unit == "share":
            allowed *= statistics.median(time_policy(network, CachePolicy.from_spec("full"), ids, timed)[1])  # type: ignore[arg-type]
        sizes = sorted({max(1, length // part) for part in (8, 4, 2, 1)})
        taken = [seconds(entries) for entries in sizes]
        if taken[0] > allowed:
            raise InputError(
                f"{method.name} takes {1000 * taken[0]:.3g} ms per token with {sizes[0]} entries per head already; "
                f"the budget is {1000 * allowed:.3g} ms"
            )
        fit = 0
        while fit + 1 < len(sizes) and taken[fit + 1] <= allowed:
            fit += 1
        if fit + 1 == len(sizes):
            return length
        part = (allowed - taken[fit]) / (taken[fit + 1] - taken[fit])
        return sizes[fit] + int(part * (sizes[fit + 1] - sizes[fit]))

    def _text(self, network: Any, length: int) -> torch.Tensor:
        """Tokens to measure on, ``(1, length)``: bytes and seconds do not depend on which they are."""
        vocabulary = network.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        return ids.to(network.device)


def most_within(held: Callable[[int], float], allowed: float, most: int) -> int:
    """The largest number up to ``most`` for which ``held``, which grows with it, stays within ``allowed``; or 0.

    Bytes nearly lie on a straight line, so every other guess is where the line between the ends reaches what is
    allowed; the others halve what is left, for those that do not.
    """
    low, high, below, above = 0, most, 0.0, held(most)
    if above <= allowed:
        return most
    halve = False
    while high - low > 1:
        part = 0.5 if halve or above <= below else (allowed - below) / (above - below)
        guess = min(max(low + int(part * (high - low)), low + 1), high - 1)
        now_held = held(guess)
        if now_held <= allowed:
            low, below = guess, now_held
        else:
            high, above = guess, now_held
        halve = not halve
    return low
