"""The measuring part of an audit: what is missing in the ledger, one step after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige.core.anatomy import Anatomy
from vestige.errors import SpecError
from vestige.evidence.audit.plan import AuditPlan
from vestige.evidence.budgets import at, label
from vestige.evidence.engine.bench import given, now, time_policy
from vestige.evidence.engine.reading import read, reading_groups
from vestige.evidence.engine.record import Advance, Record, cell_key, progress_bar
from vestige.evidence.probes.retrieval_heads import HeadScores, Probed
from vestige.evidence.probes.sink_share import sink_share
from vestige.evidence.tasks.needle import NeedlePrompt, context_batch, recite

if TYPE_CHECKING:
    import pandas as pd

    from vestige.context.policy import CachePolicy

__all__ = ["Auditor"]

QUESTION_TOKENS = 40  # of one question, as counted in the estimate of the time left
DECODED_TOKEN = 12  # prompt tokens that take as long as one decoded token, for the same estimate


class Auditor:
    """Measures what a plan asks for and a ledger lacks, row after row; a killed run loses the row in hand."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, plan: AuditPlan, ledger: Path, *, progress: bool = True
    ) -> None:
        self.name, self.model, self.tokenizer, self.progress = name, model, tokenizer, progress
        self.anatomy = Anatomy.of(model)
        self.anatomy.need_causal("the audit")
        self.plan = plan = plan.on(self.anatomy)
        self.prompts = [needle.build(tokenizer) for needle in plan.needles()]
        longest = max(len(prompt.input_ids) + len(prompt.answer_ids) for prompt in self.prompts)
        if longest > self.anatomy.max_positions:
            raise SpecError(
                f"audit: parameter 'length' is {plan.length}; with its question that is {longest} tokens, and "
                f"{name} reads {self.anatomy.max_positions} at most"
            )
        self.given = given(model)
        self.record = Record(ledger)
        self.known = self.record.known
        self.head_keys = {n: self._key("heads", task=n.spec(), recall=plan.heads.RECALL) for n in plan.heads.needles()}
        self.sink_keys = {needle: self._key("sinks", task=needle.spec(), first=1) for needle in plan.sinks}
        self.cell_keys = {
            policy: {
                (prompt.needle, budget): self._key(
                    "retention", method=at(policy, budget).spec(), task=prompt.needle.spec()
                )
                for prompt in self.prompts
                for budget in plan.budgets_of(policy)
            }
            for policy in plan.policies
        }
        self.cost_keys = {
            policy: self._key(
                "cost", method=self._timed(policy).spec(), task=self.prompts[0].needle.spec(), n=plan.decode_tokens
            )
            for policy in plan.policies
        }

    def measure(self) -> dict[str, Any]:
        """All that the plan asks for, in the terms of :class:`~vestige.evidence.audit.AuditResult`."""
        with progress_bar("audit", self._missing_work(), self.progress) as advance:
            return {
                "anatomy": self._anatomy(),
                "heads": self._heads(advance),
                "sinks": self._sinks(advance),
                "cells": self._retention(advance),
                "costs": self._costs(advance),
                "measured": self.record.measured,
            }

    def _anatomy(self) -> dict[str, Any]:
        anatomy = self.anatomy
        numbers = {
            "architecture": anatomy.architecture,
            "parameters": anatomy.parameter_count(),
            "layers": anatomy.num_layers,
            "heads": anatomy.num_heads,
            "kv_heads": anatomy.num_kv_heads,
            "head_dim": anatomy.head_dim,
            "hidden_size": anatomy.hidden_size,
            "vocabulary": anatomy.vocab_size,
            "positions": anatomy.position,
            "max_positions": anatomy.max_positions,
            "sliding_layers": sum(window is not None for window in anatomy.sliding_windows),
            "cache_bytes_per_token": anatomy.cache_bytes_per_token(),
        }
        key = self._key("anatomy")
        if key not in self.known:
            self._store(key, task={"name": "anatomy"}, metrics=numbers)
        return numbers | {k: self.given[k] for k in ("dtype", "device")}

    def _heads(self, advance: Advance) -> HeadScores:
        probe = self.plan.heads
        missing = [needle for needle, key in self.head_keys.items() if key not in self.known]
        began = time.perf_counter()
        for probed in probe.stream(self.model, self.tokenizer, missing):
            seconds, began = time.perf_counter() - began, time.perf_counter()
            self._store(
                self.head_keys[probed.needle],
                method=probe.spec(),
                task=probed.needle.spec(),
                seed=probed.needle.seed,
                metrics={"recall": probed.recall, "said": list(probed.said), "shares": _rounded(probed.shares)},
                seconds=seconds,
            )
            advance(probed.needle.length, "retrieval heads")
        rows = [(needle, self.known[key]["metrics"]) for needle, key in self.head_keys.items()]
        prompts = [Probed(n, tuple(m["said"]), m["recall"], np.array(m["shares"], dtype=float)) for n, m in rows]
        return HeadScores(tuple(prompts), probe.threshold)

    def _sinks(self, advance: Advance) -> np.ndarray:
        for needle, key in self.sink_keys.items():
            if key not in self.known:
                began = time.perf_counter()
                ids = context_batch([needle.build(self.tokenizer)], self.model.device)
                shares = _rounded(sink_share(self.model, ids)[0])
                seconds = time.perf_counter() - began
                metrics = {"first": 1, "shares": shares}
                self._store(key, task=needle.spec(), seed=needle.seed, metrics=metrics, seconds=seconds)
                advance(needle.length, "attention sinks")
        return np.mean([np.array(self.known[key]["metrics"]["shares"]) for key in self.sink_keys.values()], axis=0)

    def _retention(self, advance: Advance) -> pd.DataFrame:
        import pandas as pd

        for policies, prompts in self._passes():
            for policy, prompt, budget, row in self._ask(policies, prompts):
                if (key := self.cell_keys[policy][prompt.needle, budget]) not in self.known:
                    self._store(key, **row)
            advance(self._work(policies) * len(prompts), "needles")
        rows = []
        for policy, keys in self.cell_keys.items():
            for (needle, budget), key in keys.items():
                row = self.known[key]
                told = {name: row["metrics"][name] for name in ("found", "share")}
                place = {"policy": label(policy), "budget": budget, "length": needle.length, "depth": needle.depth}
                rows.append({**place, "seed": needle.seed, **told, "kv_bytes": row["kv_bytes"]})
        return pd.DataFrame(rows)

    def _passes(self) -> list[tuple[tuple[CachePolicy, ...], list[NeedlePrompt]]]:
        """What is yet to be read: prompts in batches, each by the policies that lack a cell of it.

        Those that read as the model does read together; the others come one by one.
        """
        passes = []
        for first in range(0, len(self.prompts), self.plan.batch):
            prompts = self.prompts[first : first + self.plan.batch]
            needles = {prompt.needle for prompt in prompts}
            lacking = [
                policy
                for policy, keys in self.cell_keys.items()
                if any(needle in needles and key not in self.known for (needle, _), key in keys.items())
            ]
            passes += [(policies, prompts) for policies in reading_groups(lacking)]
        return passes

    def _ask(
        self, policies: Sequence[CachePolicy], prompts: Sequence[NeedlePrompt]
    ) -> Iterator[tuple[CachePolicy, NeedlePrompt, int, dict[str, Any]]]:
        """Read the contexts once; for each policy and budget cut the cache, then ask."""
        cells = [(place, budget) for place, policy in enumerate(policies) for budget in self.plan.budgets_of(policy)]
        with read(self.model, policies, context_batch(prompts, self.model.device)) as reading:
            for place, budget in cells:
                began = now(self.model.device)
                cut = reading.cache(place, budget)
                held = cut.nbytes
                recitals = recite(self.model, prompts, cut)
                seconds = now(self.model.device) - began + reading.seconds / len(cells)
                for prompt, recital in zip(prompts, recitals, strict=True):
                    said = {"share": recital.share, "said": self.tokenizer.decode(recital.said)}
                    row = {
                        "method": at(policies[place], budget).spec(),
                        "task": prompt.needle.spec(),
                        "seed": prompt.needle.seed,
                        "metrics": {"budget": budget, "found": recital.found, **said},
                        "kv_bytes": held // len(prompts),
                        "seconds": seconds / len(prompts),
                    }
                    yield policies[place], prompt, budget, row

    def _costs(self, advance: Advance) -> pd.DataFrame:
        import pandas as pd

        rows = []
        missing = [policy for policy, key in self.cost_keys.items() if key not in self.known]
        ids = context_batch(self.prompts[:1], self.model.device)
        if missing:  # the first pass of a process is slower than the rest
            time_policy(self.model, self._timed(missing[0]), ids[:, : ids.shape[1] // 8], 1)
        for policy, key in self.cost_keys.items():
            if policy in missing:
                used = self._timed(policy)
                prefill, decode, held = time_policy(self.model, used, ids, self.plan.decode_tokens)
                per_token = {
                    "prefill_seconds_per_token": prefill / ids.shape[1],
                    "decode_seconds_per_token": statistics.median(decode),
                }
                self._store(
                    key,
                    method=used.spec(),
                    task={"name": "cost", "length": ids.shape[1], "decoded": len(decode)},
                    seed=self.prompts[0].needle.seed,
                    metrics={"budget": self._timed_budget(policy), **per_token},
                    kv_bytes=held,
                    seconds=prefill + sum(decode),
                )
                advance(self._cost_work(), f"time under {label(policy)}")
            row = self.known[key]
            rows.append({"policy": label(policy), **row["metrics"], "kv_bytes": row["kv_bytes"]})
        return pd.DataFrame(rows)

    def _timed_budget(self, policy: CachePolicy) -> int:
        budgets = self.plan.budgets_of(policy)
        return self.plan.timed_budget if self.plan.timed_budget in budgets else budgets[0]

    def _timed(self, policy: CachePolicy) -> CachePolicy:
        return at(policy, self._timed_budget(policy))

    def _key(self, kind: str, **what: Any) -> str:
        return cell_key(kind, **self.given, **what)

    def _store(self, key: str, **row: Any) -> None:
        self.record.store(key, study="audit", model=self.name, **row)

    def _work(self, policies: Sequence[CachePolicy]) -> float:
        return self.plan.length + QUESTION_TOKENS * sum(len(self.plan.budgets_of(policy)) for policy in policies)

    def _cost_work(self) -> float:
        return self.plan.length + DECODED_TOKEN * self.plan.decode_tokens

    def _missing_work(self) -> float:
        """What is left to do, in prompt tokens."""
        probed = self.head_keys | self.sink_keys
        return (
            sum(needle.length for needle, key in probed.items() if key not in self.known)
            + sum(self._work(policies) * len(prompts) for policies, prompts in self._passes())
            + self._cost_work() * sum(key not in self.known for key in self.cost_keys.values())
        )


def _rounded(shares: np.ndarray) -> list[list[float]]:
    return np.round(shares.astype(float), 5).tolist()
