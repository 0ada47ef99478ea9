"""What SmolLM2 still knows after its cache was cut: every method and peer, into a ledger.

    python benchmarks/context/quality.py --out benchmarks/context/quality.jsonl --alone

Three tasks at four lengths, three budgets, five seeds: a needle, a needle among others of its kind (both asked only
after the cache is cut), and the perplexity of the next 256 tokens of a long text. One pass over a text serves all
policies that read as the model does, at all budgets. Policies that read few entries while decoding answer token by
token, all others in one piece; one that drops entries only while decoding reads the text itself token by token. Plans
by windows keep as much as the budgets on the mean over heads; those that round or thin out entries stand beside with
the bytes they hold; bytes are counted as if keys and values had 16 bits.

One row for each policy, budget, task, length and seed, which says on what machine it came to be. Rows are kept as they
come: an interrupted run goes on where it was, the shorter texts first. Several runs may write into one file at once,
each with its own lengths, tasks or seeds.
"""

from __future__ import annotations

import argparse
import itertools
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vestige
from vestige.context.cache import KeptCache
from vestige.context.policy import CachePolicy
from vestige.context.select.base import Select
from vestige.core.ledger import Ledger
from vestige.errors import SpecError
from vestige.evidence.budgets import evicts
from vestige.evidence.data.text import passages
from vestige.evidence.engine.reading import read, reading_groups
from vestige.evidence.tasks.needle import Needle, NeedlePrompt, context_batch, recite

SCORES = ("streaming-llm", "h2o", "a2sf", "snapkv", "tova", "knorm", "expected-attention")
PLANS = (("pyramid", "snapkv"), ("adaptive", "snapkv"), ("adaptive", "a2sf"))
BY_TOKEN = "lazy-eviction"
READERS = ("recycled-attention", "tidal-decode", "longheads")
SHARES = (0.5, 0.25, 0.1)
TASKS = ("needle", "perplexity", "multi-key needle")
DEPTHS = (0.1, 0.5, 0.9)
DISTRACTORS = 6
CONTINUATION = 256


@dataclass(frozen=True)
class Contender:
    """A policy and what it is called; ``budget`` is what it may keep or read of each text, ``None`` for all."""

    name: str
    policy: CachePolicy
    budget: int | None = None

    def key(self, task: str, length: int, seed: int) -> str:
        return f"{self.name} {self.budget or length} {task} {length} {seed}"


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
        if share == 0.5:  # rules are chosen for a density
            yield from _possible("moa", budget, "moa", density=share)
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
    """Bytes held, keys and values at full width counted with two bytes for each number."""
    total = 0
    for layer in cache.layers:
        for name, tensor in layer.tensors().items():
            of_model = name.split(" ")[0] in ("keys", "values") and tensor.dtype == layer.dtype
            total += tensor.numel() * (2 if of_model else tensor.element_size())
    return total


def answer_in_steps(model: Any, prompts: list[NeedlePrompt], cache: KeptCache) -> list[bool]:
    """Whether the answers come out, fed token by token: policies that act while decoding do act."""
    found = []
    for row, prompt in enumerate(prompts):
        mine, said = cache.fork(), []
        mine.batch_select_indices(torch.tensor([row], device=model.device))
        for token in prompt.question_ids + prompt.answer_ids[:-1]:
            logits = model(torch.tensor([[token]], device=model.device), past_key_values=mine, use_cache=True).logits
            said.append(int(logits[0, -1].argmax()))
        found.append(tuple(said[len(prompt.question_ids) - 1 :]) == prompt.answer_ids)
    return found


def perplexity(model: Any, ids: torch.Tensor, cache: KeptCache) -> float:
    """Of the continuation."""
    logits = model(ids[:, -CONTINUATION - 1 : -1], past_key_values=cache, use_cache=True).logits
    return float(torch.nn.functional.cross_entropy(logits[0].float(), ids[0, -CONTINUATION:]).exp())


class Grid:
    """Measures what a ledger lacks of one task, length and seed after the other."""

    def __init__(self, model: Any, tokenizer: Any, ledger: Ledger, name: str) -> None:
        self.model, self.tokenizer, self.ledger, self.name = model, tokenizer, ledger, name

    def measure(self, contenders: list[Contender], task: str, length: int, seed: int) -> None:
        missing = [one for one in contenders if not self.ledger.has(one.key(task, length, seed))]
        if task == "perplexity":  # what reads few entries while decoding reads a chunk as the model does
            missing = [one for one in missing if not isinstance(one.policy, Select)]
        if not missing:
            return
        if task == "perplexity":
            prompts, text = [], passages(self.tokenizer, length + CONTINUATION, (seed,)).to(self.model.device)
            ids = text[:, : -CONTINUATION - 1]
        else:
            prompts, text = [needle.build(self.tokenizer) for needle in needles(task, length, seed)], None
            ids = context_batch(prompts, self.model.device)
        # The text depends on the version of Python, whose reference it is: rows of one text alone can be compared.
        own = {"depths": DEPTHS} if text is None else {"text": zlib.crc32(repr(text.tolist()).encode())}
        about = {"name": task, "length": length, **own}
        by_policy: dict[CachePolicy, list[Contender]] = {}
        for one in [one for one in missing if one.name == BY_TOKEN]:
            missing.remove(one)
            with one.policy.attach(self.model) as kept:
                cache = kept.new_cache()
                for token in ids.split(1, dim=1):
                    self.model(token, past_key_values=cache, logits_to_keep=1)
                cache.frozen = True
                self._score(one, cache, prompts, text, about, length, seed)
        for one in missing:  # what differs by its budget alone shares a pass
            once = one.policy.replace(when="prefill") if hasattr(one.policy, "when") else one.policy
            by_policy.setdefault(once.with_budget(1.0) if evicts(once) else once, []).append(one)
        for group in reading_groups(by_policy):
            try:
                with read(self.model, group, ids) as reading:
                    for place, one in itertools.chain.from_iterable(
                        ((place, one) for one in by_policy[policy]) for place, policy in enumerate(group)
                    ):
                        cache = reading.cache(place, one.budget if evicts(one.policy) else None)
                        self._score(one, cache, prompts, text, about, length, seed)
            except SpecError as error:  # a plan that was fitted on another model
                print(f"left out: {error}")

    def _score(
        self,
        one: Contender,
        cache: KeptCache,
        prompts: list[NeedlePrompt],
        text: torch.Tensor | None,
        about: dict[str, Any],
        length: int,
        seed: int,
    ) -> None:
        """Ask what the cache still knows: of the prompts, or of the text that goes on."""
        held = sixteen_bit_bytes(cache) // (1 if text is not None else len(prompts))
        if text is not None:
            score = perplexity(self.model, text, cache)
        elif isinstance(one.policy, Select):
            score = sum(answer_in_steps(self.model, prompts, cache)) / len(prompts)
        else:
            score = sum(recital.found for recital in recite(self.model, prompts, cache)) / len(prompts)
        self._store(one, about, length, seed, held, score)

    def _store(self, one: Contender, about: dict[str, Any], length: int, seed: int, held: int, score: float) -> None:
        task = about["name"]
        self.ledger.append(
            {
                "study": "quality",
                "method": one.policy.spec(),
                "model": self.name,
                "task": about,
                "seed": seed,
                "metrics": {"policy": one.name, "budget": one.budget or length, "score": score},
                "kv_bytes": held,
            },
            key=one.key(task, length, seed),
        )
        print(f"{length:5} {seed} {task:17} {one.name:26} {one.budget or length:5} {score:.3f}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--policies", nargs="+", help="names as the rows have them; default: all")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--alone", action="store_true", help="also the methods that need a pass of their own")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    model, tokenizer = vestige.models.load(args.model, device=args.device, dtype="float32")
    grid = Grid(model, tokenizer, Ledger(args.out), args.model)
    for length in args.lengths:
        possible = [one for one in contenders(length, args.alone) if args.policies is None or one.name in args.policies]
        for task, seed in itertools.product(args.tasks, args.seeds):
            if time.monotonic() > end:
                print(f"{args.minutes:g} minutes are over; the same command goes on from here")
                return
            grid.measure(possible, task, length, seed)


if __name__ == "__main__":
    main()
