"""The measuring part of an audit: what is missing in the ledger, one step after the other."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import vestige
from vestige.core.anatomy import Anatomy
from vestige.core.ledger import Ledger
from vestige.errors import LedgerError, SpecError, UnsupportedModelError
from vestige.evidence.audit.plan import AuditPlan, at, evicts, label
from vestige.evidence.probes.retrieval_heads import HeadScores, Probed
from vestige.evidence.probes.sink_share import sink_share
from vestige.evidence.tasks.needle import NeedlePrompt, context_batch, recite

if TYPE_CHECKING:
    import pandas as pd

    from vestige.context.policy import CachePolicy

__all__ = ["Auditor", "cell_key", "fingerprint"]

QUESTION_TOKENS = 40  # of one question, as counted in the estimate of the time left
DECODED_TOKEN = 12  # prompt tokens that take as long as one decoded token, for the same estimate
WARM_UP = 3  # decoded tokens that are not timed

Advance = Callable[[float, str], None]


class Auditor:
    """Measures what a plan asks for and a ledger lacks, row after row; a killed run loses the row in hand."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, plan: AuditPlan, ledger: Path, *, progress: bool = True
    ) -> None:
        self.name, self.model, self.tokenizer, self.plan, self.progress = name, model, tokenizer, plan, progress
        self.anatomy = Anatomy.of(model)
        if not self.anatomy.causal:
            raise UnsupportedModelError(f"the audit needs a causal decoder; {self.anatomy.architecture} is none")
        self.prompts = [needle.build(tokenizer) for needle in plan.needles()]
        longest = max(len(prompt.input_ids) + len(prompt.answer_ids) for prompt in self.prompts)
        if longest > self.anatomy.max_positions:
            raise SpecError(
                f"audit: parameter 'length' is {plan.length}; with its question that is {longest} tokens, and "
                f"{name} reads {self.anatomy.max_positions} at most"
            )
        self.given = {
            "vestige": vestige.__version__,
            "weights": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": _device_name(model.device),
        }
        ledger.parent.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(ledger)
        self.known: dict[str, dict[str, Any]] = {row["key"]: row for row in self.ledger.rows() if row.get("key")}
        self.measured = 0
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
        with self._bar() as advance:
            return {
                "anatomy": self._anatomy(),
                "heads": self._heads(advance),
                "sinks": self._sinks(advance),
                "cells": self._retention(advance),
                "costs": self._costs(advance),
                "measured": self.measured,
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

        rows = []
        for policy, keys in self.cell_keys.items():
            missing = self._unasked(policy)
            for first in range(0, len(missing), self.plan.batch):
                some = missing[first : first + self.plan.batch]
                for prompt, budget, row in self._ask(policy, some):
                    self._store(keys[prompt.needle, budget], **row)
                advance(self._work(policy) * len(some), f"needles under {label(policy)}")
            for (needle, budget), key in keys.items():
                row = self.known[key]
                told = {name: row["metrics"][name] for name in ("found", "share")}
                place = {"policy": label(policy), "budget": budget, "length": needle.length, "depth": needle.depth}
                rows.append({**place, "seed": needle.seed, **told, "kv_bytes": row["kv_bytes"]})
        return pd.DataFrame(rows)

    def _unasked(self, policy: CachePolicy) -> list[NeedlePrompt]:
        """The prompts of which some budget is missing."""
        keys = self.cell_keys[policy]
        left = {needle for (needle, _), key in keys.items() if key not in self.known}
        return [prompt for prompt in self.prompts if prompt.needle in left]

    def _ask(
        self, policy: CachePolicy, prompts: Sequence[NeedlePrompt]
    ) -> Iterator[tuple[NeedlePrompt, int, dict[str, Any]]]:
        """Read the contexts once; for each budget cut the cache, then ask."""
        budgets = self.plan.budgets_of(policy)
        with at(policy, 1.0).attach(self.model) as kept, torch.inference_mode():
            began = _now(self.model.device)
            self.model(context_batch(prompts, self.model.device), use_cache=True, logits_to_keep=1)
            cache = kept.cache
            assert cache is not None
            reading = (_now(self.model.device) - began) / len(budgets)
            for budget in budgets:
                began = _now(self.model.device)
                cut = cache.cut(budget) if evicts(policy) else cache.fork()
                held = cut.nbytes
                recitals = recite(self.model, prompts, cut)
                seconds = _now(self.model.device) - began + reading
                for prompt, recital in zip(prompts, recitals, strict=True):
                    said = {"share": recital.share, "said": self.tokenizer.decode(recital.said)}
                    row = {
                        "method": at(policy, budget).spec(),
                        "task": prompt.needle.spec(),
                        "seed": prompt.needle.seed,
                        "metrics": {"budget": budget, "found": recital.found, **said},
                        "kv_bytes": held // len(prompts),
                        "seconds": seconds / len(prompts),
                    }
                    yield prompt, budget, row

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
        return self.plan.timed_budget if evicts(policy) else self.plan.length

    def _timed(self, policy: CachePolicy) -> CachePolicy:
        return at(policy, self._timed_budget(policy))

    def _key(self, kind: str, **what: Any) -> str:
        return cell_key(kind, **self.given, **what)

    def _store(self, key: str, **row: Any) -> None:
        """Append a row, and know it. Another audit of the same folder may have been faster: then its row stands."""
        try:
            self.ledger.append({"study": "audit", "model": self.name, **row}, key=key)
            self.measured += 1
        except LedgerError:
            if not self.ledger.has(key):
                raise
        self.known[key] = row

    def _work(self, policy: CachePolicy) -> float:
        return self.plan.length + QUESTION_TOKENS * len(self.plan.budgets_of(policy))

    def _cost_work(self) -> float:
        return self.plan.length + DECODED_TOKEN * self.plan.decode_tokens

    def _missing_work(self) -> float:
        """What is left to do, in prompt tokens."""
        probed = self.head_keys | self.sink_keys
        return (
            sum(needle.length for needle, key in probed.items() if key not in self.known)
            + sum(self._work(policy) * len(self._unasked(policy)) for policy in self.plan.policies)
            + self._cost_work() * sum(key not in self.known for key in self.cost_keys.values())
        )

    @contextmanager
    def _bar(self) -> Iterator[Advance]:
        """A progress bar on stderr; it counts what is left to do."""
        if not self.progress:
            yield lambda work, what: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("audit", total=self._missing_work())
            yield lambda work, what: bar.update(task, advance=work, description=what)


def time_policy(model: Any, policy: CachePolicy, ids: torch.Tensor, tokens: int) -> tuple[float, list[float], int]:
    """Seconds of reading ``ids``, seconds of each of ``tokens`` decoded tokens, and the bytes held at the end.

    The policy works as a user would have it work: entries go while reading and while decoding.
    """
    with policy.attach(model) as kept, torch.inference_mode():
        cache = kept.new_cache()
        began = _now(model.device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(dim=-1)
        prefill = _now(model.device) - began
        decode = []
        for _ in range(WARM_UP + tokens):
            began = _now(model.device)
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(dim=-1)
            decode.append(_now(model.device) - began)
        return prefill, decode[WARM_UP:], kept.nbytes


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rounded(shares: np.ndarray) -> list[list[float]]:
    return np.round(shares.astype(float), 5).tolist()


def fingerprint(network: Any) -> str:
    """What tells two models apart: names, shapes and a sample of the values of all weights, hashed."""
    import torch

    digest = hashlib.sha256()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            flat = weight.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 32)][:32].float().cpu().numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def cell_key(kind: str, **what: Any) -> str:
    """The ledger key of a measurement: its kind, and a hash of all that it depends on."""
    text = json.dumps(what, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
