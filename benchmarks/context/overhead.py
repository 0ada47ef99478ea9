"""What a policy costs a decoding step on the CPU, beside the model with a cache of its own.

    python benchmarks/context/overhead.py --out benchmarks/context/overhead.json

SmolLM2 in float32. Two figures for each policy, both as a ratio to the model alone at the same context: a step at 1,024
tokens, and one at 4,096 tokens, each with a budget of 512. Prompts are read in chunks, entries dropped as they go. The
policy and the model alone take turns, a few steps each, several rounds, so that what else the machine does falls on
both alike; the medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, keep

import vestige
from vestige.context.plan.windows import HeadWindows
from vestige.context.policy import CachePolicy
from vestige.context.select.base import Select
from vestige.context.select.longheads import LongHeads
from vestige.context.thin.compact import Thin
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.budgets import at
from vestige.evidence.data.text import passages

BUDGET, CHUNK, STEPS = 512, 512, 6
NARROW = {"sinks": 4, "recent": 252}  # what heads that look near keep, where a plan goes by windows


def policies() -> dict[str, CachePolicy]:
    """Every cache policy, at the budget where it has one."""
    found = {}
    for card in vestige.methods():
        cls = registry.load(card.name)
        if not issubclass(cls, CachePolicy):
            continue
        changes: dict[str, Any] = {}
        if issubclass(cls, HeadWindows):
            changes = {name: value for name, value in NARROW.items() if card.name != "moa"}
        elif issubclass(cls, LongHeads):
            changes = {"budget": BUDGET, "chunk": BUDGET // 8}
        elif issubclass(cls, Select):
            changes = {"budget": BUDGET}
        policy = cls(**changes)
        if issubclass(cls, Thin):
            policy = policy.replace(policy=vestige.method("h2o"))
        found[card.name] = policy if changes else at(policy, BUDGET)
    return found


class Turn:
    """One cache that is decoded from, a few steps at a time."""

    def __init__(self, model: Any, policy: CachePolicy | None, prompt: torch.Tensor) -> None:
        self.model, self.policy, self.seconds = model, policy, []  # type: ignore[var-annotated]
        self.cache = transformers.DynamicCache()

        def read() -> None:
            for chunk in prompt.split(CHUNK, dim=1):
                self.out = model(chunk, past_key_values=self.cache, logits_to_keep=1)

        self._attached(read, fresh=True)

    def _attached(self, work: Callable[[], None], fresh: bool = False) -> None:
        if self.policy is None:
            work()
            return
        with self.policy.attach(self.model) as kept:
            if fresh:
                self.cache = kept.new_cache()
            work()

    def take(self) -> None:
        def steps() -> None:
            for step in range(STEPS):
                token = self.out.logits[:, -1:].argmax(-1)
                began = time.perf_counter()
                self.out = self.model(token, past_key_values=self.cache)
                if step:  # the first one finds cold caches
                    self.seconds.append(time.perf_counter() - began)

        self._attached(steps)


class Table:
    """The rows that were measured, kept as they come; an interrupted run goes on where it was."""

    def __init__(self, path: Path, threads: int) -> None:
        facts = {
            "model": "smollm2, float32",
            "budget": BUDGET,
            "threads": threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.path, self.result = path, facts | {"rows": []}
        if path.exists():
            before = json.loads(path.read_text())
            if {name: before[name] for name in facts} != facts:
                raise SystemExit(f"{path} comes from another machine or another version; write to another file")
            self.result = before
        self.rows: list[dict[str, Any]] = self.result["rows"]

    def lacks(self, context: int, policy: str) -> bool:
        return not any(row["context"] == context and row["policy"] == policy for row in self.rows)

    def add(self, context: int, policy: str, seconds: list[float], alone: list[float]) -> None:
        step, beside = statistics.median(seconds), statistics.median(alone)
        row = {"context": context, "policy": policy, "ms": 1e3 * step, "alone_ms": 1e3 * beside, "ratio": step / beside}
        self.rows.append(row)
        print(f"{context:6} {policy:20} {1e3 * step:8.2f} ms  {step / beside:6.3f}", flush=True)
        keep(self.path, self.result)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--methods", nargs="+", help="names; default: every cache policy")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    given = parser.parse_args()
    clock = Clock(given.minutes)
    torch.set_num_threads(given.threads)
    model, tokenizer = vestige.models.load(given.model, dtype="float32", device="cpu")
    chosen = {name: policy for name, policy in policies().items() if not given.methods or name in given.methods}
    table = Table(given.out, given.threads)
    for context in given.contexts:
        prompt, alone = passages(tokenizer, context, (0,)), None
        for name, policy in chosen.items():
            if not table.lacks(context, name):
                continue
            if clock.over:
                print(f"{given.minutes:g} minutes are over; the same command goes on from here")
                return
            alone = alone or Turn(model, None, prompt)
            try:
                turn = Turn(model, policy, prompt)
            except SpecError as error:
                print(f"left out: {error}")
                continue
            alone.seconds.clear()
            for _ in range(given.rounds):
                alone.take()
                turn.take()
            table.add(context, name, turn.seconds, alone.seconds)


if __name__ == "__main__":
    main()
