"""What SmolLM2 still knows after its cache was cut: every method and peer, into a ledger.

    python benchmarks/context/quality.py --out benchmarks/context/quality.jsonl --alone

Three tasks at four lengths, three budgets, five seeds: a needle, a needle among others of its kind (both asked only
after the cache is cut), and the perplexity of the next 256 tokens of a long text. One pass over a text serves all
policies that read as the model does, at all budgets. Policies that read few entries while decoding answer token by
token, all others in one piece; one that drops entries only while decoding reads the text itself token by token. Those
that go by token take many texts at a time, side by side. Plans by windows keep as much as the budgets on the mean over
heads; those that round or thin out entries stand beside with the bytes they hold; bytes are counted as if keys and
values had 16 bits.

One row for each policy, budget, task, length and seed, which says on what machine it came to be. Rows are kept as they
come: an interrupted run goes on where it was, the shorter texts first. Several runs may write into one file at once,
each with its own lengths, tasks or seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock

import vestige
from vestige.context.cache import KeptCache
from vestige.context.policy import CachePolicy
from vestige.context.select.base import Select
from vestige.core.anatomy import Anatomy
from vestige.core.ledger import Ledger
from vestige.errors import SpecError
from vestige.evidence.budgets import evicts
from vestige.evidence.data.text import passages
from vestige.evidence.engine.reading import read, reading_groups
from vestige.evidence.tasks.needle import Needle, context_batch, recite

SCORES = ("streaming-llm", "h2o", "a2sf", "snapkv", "tova", "knorm", "expected-attention")
PLANS = (("pyramid", "snapkv"), ("adaptive", "snapkv"), ("adaptive", "a2sf"))
BY_TOKEN = "lazy-eviction"
READERS = ("recycled-attention", "tidal-decode", "longheads")
SHARES = (0.5, 0.25, 0.1)
TASKS = ("needle", "perplexity", "multi-key needle")
DEPTHS = (0.1, 0.5, 0.9)
DISTRACTORS = 6
CONTINUATION = 256
STATES = {"keys", "values", "chunks", "queries", "query"}  # words for what is as wide as the model's own numbers
HELD = 2**16  # entries of a head that the caches of texts side by side hold together at most
PAIRS = 2**26  # pairs of tokens of a head that attention over texts side by side compares at once

Cell = tuple[str, int]  # a task and a seed


@dataclass(frozen=True)
class Contender:
    """A policy and what it is called; ``budget`` is what it may keep or read of each text, ``None`` for all."""

    name: str
    policy: CachePolicy
    budget: int | None = None

    def key(self, task: str, length: int, seed: int) -> str:
        return f"{self.name} {self.budget or length} {task} {length} {seed}"

    @property
    def by_token(self) -> bool:
        """Whether it reads the text, or answers, token by token."""
        return self.name == BY_TOKEN or isinstance(self.policy, Select)


def contenders(length: int, alone: bool) -> Iterator[Contender]:
    """Methods at every budget, and those that need a pass ``alone`` at one; one that asks for more than the budget is
    left out, and said to be."""
    yield Contender("full", vestige.method("full"))
    for share in SHARES:
        budget = int(share * length)
        for name in SCORES:
            yield from _possible(name, budget, name, budget=budget)
        for plan, name in PLANS:
            yield from _possible(f"{plan}({name})", budget, plan, policy={"name": name, "budget": budget})
        # Heads that keep all take four fifths of the budget, the near sight of the others the rest.
        whole, near = 0.8 * share, int(0.2 * share / (1 - 0.8 * share) * length)
        yield from _possible("duo-attention", budget, "duo-attention", share=whole, sinks=4, recent=near - 4)
        shares = {"induction_share": 0.9 * whole, "echo_share": 0.1 * whole}
        yield from _possible(
            "razor-attention", budget, "razor-attention", **shares, sinks=4, recent=near - 4, compression=1e6
        )
        # Rules are chosen for a density; less than half has no room for the windows that it comes with.
        ends = {} if share == 0.5 else {"sinks": 4, "recent": 12}
        yield from _possible("moa", budget, "moa", density=share, **ends)
    if not alone:
        return
    for share in SHARES:
        budget = int(share * length)
        kept = {"name": "snapkv", "budget": budget}
        yield from _possible("think(snapkv)", budget, "think", policy=kept, ratio=0.5)
        for name in READERS:
            chunk = {"chunk": budget // 8} if name == "longheads" else {}
            yield from _possible(name, budget, name, budget=budget, **chunk)
    for bits in (4, 2):
        yield Contender(f"quantised-cache, {bits} bits", vestige.method("quantised-cache", bits=bits))
    yield Contender("act", vestige.method("act"))
    for share in SHARES:
        budget = int(share * length)
        yield from _possible(BY_TOKEN, budget, BY_TOKEN, budget=budget, lag=min(128, budget // 2))


def _possible(label: str, limit: int, method: str, **parameters: Any) -> Iterator[Contender]:
    try:
        yield Contender(label, vestige.method(method, **parameters), limit)
    except SpecError as error:
        print(f"left out: {error}")


def needles(task: str, length: int, seed: int) -> list[Needle]:
    """The needles of a seed, one at each depth."""
    lures = DISTRACTORS if task == "multi-key needle" else 0
    return [Needle(length=length, depth=depth, seed=seed, distractors=lures) for depth in DEPTHS]


def sixteen_bit_bytes(cache: KeptCache) -> int:
    """Bytes held, keys, values and what is made of such counted with two bytes for each number of full width."""
    total = 0
    for layer in cache.layers:
        for name, tensor in layer.tensors().items():
            of_model = not STATES.isdisjoint(name.split()) and tensor.dtype == layer.dtype
            total += tensor.numel() * (2 if of_model else tensor.element_size())
    return total


class Sheet:
    """Texts of one length side by side, and what is asked of them: needles of some cells, or what goes on.

    Attributes:
        ids: ``(rows, tokens)`` what is read; a cell has as many rows as each other one.
    """

    def __init__(self, tokenizer: Any, cells: list[Cell], length: int, device: Any) -> None:
        self.cells, self.length = cells, length
        self.asks = cells[0][0] != "perplexity"
        if self.asks:
            self.prompts = [needle.build(tokenizer) for task, seed in cells for needle in needles(task, length, seed)]
            self.ids = context_batch(self.prompts, device)
        else:
            seeds = tuple(seed for _, seed in cells)
            self.text = passages(tokenizer, length + CONTINUATION, seeds).to(device)
            self.ids = self.text[:, : -CONTINUATION - 1]

    def about(self, place: int) -> dict[str, Any]:
        """The task of a cell. A text depends on the version of Python, whose reference it is: rows of one text alone
        can be compared."""
        own = {"depths": DEPTHS} if self.asks else {"text": zlib.crc32(repr([self.text[place].tolist()]).encode())}
        return {"name": self.cells[place][0], "length": self.length, **own}

    def scores(self, model: Any, cache: KeptCache, steps: bool) -> list[float]:
        """What a cache still knows, cell by cell: how many answers come out, or the perplexity of what goes on. Fed in
        ``steps``, token by token, policies that act while decoding do act."""
        if self.asks:
            rows = [float(recital.found) for recital in recite(model, self.prompts, cache, steps=steps)]
        else:
            logits = model(self.text[:, -CONTINUATION - 1 : -1], past_key_values=cache, use_cache=True).logits
            due = self.text[:, -CONTINUATION:]
            rows = [float(cross_entropy(said.float(), own).exp()) for said, own in zip(logits, due, strict=True)]
        each = len(rows) // len(self.cells)
        return [sum(rows[place : place + each]) / each for place in range(0, len(rows), each)]


class Grid:
    """Measures what a ledger lacks of one length, until time is up."""

    def __init__(self, model: Any, tokenizer: Any, ledger: Ledger, name: str, clock: Clock) -> None:
        self.model, self.tokenizer, self.ledger, self.name, self.clock = model, tokenizer, ledger, name, clock

    def measure(self, contenders: list[Contender], tasks: list[str], length: int, seeds: list[int]) -> None:
        contenders = [one for one in contenders if self._known(one)]
        cells = list(itertools.product(tasks, seeds))
        whole = [one for one in contenders if not one.by_token]
        for cell in cells:
            self._measure([one for one in whole if self._lacks(one, cell, length)], [cell], length)
        for one in contenders:
            if not one.by_token:
                continue
            lacking = [cell for cell in cells if self._lacks(one, cell, length)]
            for asks in (True, False):
                alike = [cell for cell in lacking if (cell[0] != "perplexity") == asks]
                rows = HELD // (one.budget or length) if one.name == BY_TOKEN else PAIRS // length**2
                most = max(1, rows // (len(DEPTHS) if asks else 1))
                for first in range(0, len(alike), most):
                    self._measure([one], alike[first : first + most], length)

    def _known(self, one: Contender) -> bool:
        try:
            one.policy.on(Anatomy.of(self.model))
        except SpecError as error:  # a plan that was fitted on another model, or for another budget
            print(f"left out: {error}")
            return False
        return True

    def _lacks(self, one: Contender, cell: Cell, length: int) -> bool:
        task, seed = cell
        if task == "perplexity" and isinstance(one.policy, Select):
            return False  # what reads few entries while decoding reads a chunk as the model does
        return not self.ledger.has(one.key(task, length, seed))

    def _measure(self, contenders: list[Contender], cells: list[Cell], length: int) -> None:
        if not contenders or self.clock.over:
            return
        sheet = Sheet(self.tokenizer, cells, length, self.model.device)
        if contenders[0].name == BY_TOKEN:
            (one,) = contenders
            with one.policy.attach(self.model) as kept:
                cache = kept.new_cache()
                for token in sheet.ids.split(1, dim=1):
                    self.model(token, past_key_values=cache, logits_to_keep=1)
                cache.frozen = True
                self._score(one, cache, sheet)
            return
        by_policy: dict[CachePolicy, list[Contender]] = {}
        for one in contenders:  # what differs by its budget alone shares a pass
            once = one.policy.replace(when="prefill") if hasattr(one.policy, "when") else one.policy
            by_policy.setdefault(once.with_budget(1.0) if evicts(once) else once, []).append(one)
        for group in reading_groups(by_policy):
            with read(self.model, group, sheet.ids) as reading:
                for place, policy in enumerate(group):
                    for one in by_policy[policy]:
                        self._score(one, reading.cache(place, one.budget if evicts(one.policy) else None), sheet)

    def _score(self, one: Contender, cache: KeptCache, sheet: Sheet) -> None:
        """Ask what the cache still knows, and write it down."""
        held = sixteen_bit_bytes(cache) // len(sheet.ids)
        scores = sheet.scores(self.model, cache, steps=isinstance(one.policy, Select))
        for place, ((task, seed), score) in enumerate(zip(sheet.cells, scores, strict=True)):
            self.ledger.append(
                {
                    "study": "quality",
                    "method": one.policy.spec(),
                    "model": self.name,
                    "task": sheet.about(place),
                    "seed": seed,
                    "metrics": {"policy": one.name, "budget": one.budget or sheet.length, "score": score},
                    "kv_bytes": held,
                },
                key=one.key(task, sheet.length, seed),
            )
            budget = one.budget or sheet.length
            print(f"{sheet.length:5} {seed} {task:17} {one.name:26} {budget:5} {score:.3f}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--policies", nargs="+", help="names as the rows have them; default: all")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="budgets, of those three")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alone", action="store_true", help="also the methods that need a pass of their own")
    args = parser.parse_args()
    clock = Clock(args.minutes)
    model, tokenizer = vestige.models.load(args.model, device=args.device, dtype="float32")
    grid = Grid(model, tokenizer, Ledger(args.out), args.model, clock)
    for length in args.lengths:
        budgets = [int(share * length) for share in args.shares]
        possible = [
            one
            for one in contenders(length, args.alone)
            if (one.budget is None or one.budget in budgets) and (args.policies is None or one.name in args.policies)
        ]
        grid.measure(possible, args.tasks, length, args.seeds)
    if clock.over:
        print(f"{args.minutes:g} minutes are over; if anything is missing, the same command goes on from here")


if __name__ == "__main__":
    main()
