"""Why a policy finds a needle or not: what of the answer it keeps, and in which heads.

    python benchmarks/context/why.py --out benchmarks/context/why.json

Contexts of 507 tokens are cut to half before the question is known, in two kinds of filler: sentences that all differ,
and five sentences over and over. For each policy: how often the whole answer comes out, what share of the answer's
tokens is held over all heads, and what share in those that look at the answer when it is asked for. Then the same once
more with the answer's tokens kept by force: whether it is their loss alone that costs the answer.

Policies that keep every entry and read few of them are fed the question token by token; for them it is what they read
of the answer, in the layers that choose, as its tokens are to be said.

Results are kept as they come; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import BY_TOKEN, contenders

import vestige
from vestige.context.cache import KeptCache
from vestige.context.policy import CachePolicy
from vestige.context.select.base import Select
from vestige.context.select.longheads import LongHeads, _Text
from vestige.context.together import Together
from vestige.core.files import write_whole
from vestige.errors import SpecError
from vestige.evidence.budgets import evicts
from vestige.evidence.engine.reading import read
from vestige.evidence.tasks.needle import Needle, NeedlePrompt, context_batch, recite

POLICIES = ("streaming-llm", "h2o", "a2sf", "snapkv", "tova", "knorm", "expected-attention", "pyramid", "adaptive")
LENGTH, DEPTHS = 507, (0.1, 0.3, 0.5, 0.7, 0.9)
LOOKS = 0.15  # attention on the answer from which on a head counts as looking at it
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def looking_heads(model: Any, prompts: list[NeedlePrompt]) -> torch.Tensor:
    """``(layers, kv_heads)`` whether a query head of it looks at the answer as the first token of it is to be said."""
    found = []
    with vestige.method("full").attach(model) as kept, torch.inference_mode():

        def look(layer: int, query: Any, keys: Any, positions: Any, scaling: float) -> None:
            group = query.shape[1] // keys.shape[1]
            share = (query[0, :, -1:] @ keys[0].repeat_interleave(group, dim=0).mT * scaling).softmax(-1)[:, 0]
            first, last = prompt.answer_span
            seen.append(share[:, first - 1 : last].sum(-1).view(-1, group).amax(1))

        kept.watch(look)
        for prompt in prompts:
            seen: list[torch.Tensor] = []
            model(torch.tensor([prompt.input_ids], device=model.device), use_cache=True, logits_to_keep=1)
            found.append(torch.stack(seen))
    return torch.stack(found).mean(0) > LOOKS


def held(cache: KeptCache, prompts: list[NeedlePrompt]) -> torch.Tensor:
    """``(layers, kv_heads)`` share of the answers' tokens that are held, mean over the prompts."""
    layers = []
    for index in range(len(cache.layers)):
        positions = cache.positions(index)
        rows = []
        for row, prompt in enumerate(prompts):
            span = torch.arange(*prompt.answer_span, device=positions.device)
            rows.append((positions[row, :, :, None] == span).any(1).float().mean(-1))
        layers.append(torch.stack(rows).mean(0))
    return torch.stack(layers)


def forced(policy: CachePolicy, prompts: list[NeedlePrompt]) -> CachePolicy:
    """The policy with the answers' tokens ranked above all others."""
    inner = getattr(policy, "policy", policy)

    class Forced(type(inner)):  # type: ignore[misc]
        def score(self, entries: Any) -> torch.Tensor:
            score = super().score(entries).clone()
            positions = entries._positions(entries.slots)
            for row, prompt in enumerate(prompts):
                first, last = prompt.answer_span
                answer = (positions[row] >= first) & (positions[row] < last)
                score[row] = score[row].masked_fill(answer, torch.finfo(score.dtype).max / 2)
            return score

    same = Forced(**{name: getattr(inner, name) for name in inner.parameters()})
    return same if inner is policy else policy.replace(policy=same)


@torch.inference_mode()
def look_into(
    model: Any, names: list[str], prompts: list[NeedlePrompt], heads: torch.Tensor, budget: int
) -> dict[str, Any]:
    """What each policy does with the prompts, which are read once for all."""
    policies, rows = [vestige.method(name) for name in names], {}
    with read(model, policies, context_batch(prompts, model.device)) as reading:
        shared, cache = reading.kept.policy, reading.kept.cache
        assert isinstance(shared, Together) and cache is not None
        for place, name in enumerate(names):
            cut = reading.cache(place, budget)
            share = held(cut, prompts)
            found = [recital.found for recital in recite(model, prompts, cut)]
            part = shared.part(cache, place)
            part.policy = forced(part.policy, prompts)
            by_force = [recital.found for recital in recite(model, prompts, part.cut(budget))]
            rows[name] = {
                "prompts": len(prompts),
                "found": sum(found) / len(found),
                "answer_held": float(share.mean()),
                "answer_held_where_looked_for": float(share[heads].mean()),
                "found_with_answer_kept": sum(by_force) / len(by_force),
                "by_depth": {str(d): sum(f := found[n :: len(DEPTHS)]) / len(f) for n, d in enumerate(DEPTHS)},
            }
            print(name, rows[name], flush=True)
    return rows


def watched(policy: Select, prompts: list[NeedlePrompt], seen: dict[int, torch.Tensor]) -> Select:
    """The policy, which notes for each layer that chooses what share of the answer a token reads in each head.

    Prompts are answered one by one: ``seen`` holds their number as ``-1``.
    """

    class Watched(type(policy)):  # type: ignore[misc]
        def read(self, entries: Any, look: Any, step: Any) -> Any:
            reading = super().read(entries, look, step)
            if reading is not None:
                answer = entries.keys[0, :, slice(*prompts[int(seen[-1])].answer_span)]
                keys = torch.cat([part for _, part in reading.parts], dim=2)[0]
                same = (keys[:, :, None] == answer[:, None]).all(-1)  # keys differ wherever they stand
                if reading.valid is not None:
                    same &= reading.valid[0, :, :, None]
                seen[entries.index] = same.any(1).float().mean(-1)
            return reading

    class WatchedChunks(type(policy)):  # type: ignore[misc]
        def _attend_one(self, entries: Any, look: Any, step: Any) -> torch.Tensor:
            return self._attend(entries, _Text(entries, look, step), 0, 1)  # as for many, which chooses in the open

        def _choose(self, entries: Any, text: Any, near: Any) -> torch.Tensor:
            chosen = super()._choose(entries, text, near)
            answer = torch.arange(*prompts[int(seen[-1])].answer_span, device=chosen.device) // self.chunk
            seen[entries.index] = (chosen[0, :, 0, :, None] == answer).any(1).float().mean(-1)
            return chosen

    cls = WatchedChunks if isinstance(policy, LongHeads) else Watched
    return cls(**{name: getattr(policy, name) for name in policy.parameters()})


def answers_read(
    model: Any, policy: Select, cache: KeptCache, prompts: list[NeedlePrompt], heads: torch.Tensor
) -> dict[str, float]:
    """What is read of the answers as they are to be said, in all heads of the layers that choose, and in those heads
    that look."""
    everywhere, where_looked = [], []
    for row, prompt in enumerate(prompts):
        seen: dict[int, torch.Tensor] = {-1: torch.tensor(row)}
        mine = cache.fork()
        mine.batch_select_indices(torch.tensor([row], device=model.device))
        mine.policy = watched(policy, prompts, seen)
        for number, token in enumerate(prompt.question_ids + prompt.answer_ids[:-1], start=1):
            model(torch.tensor([[token]], device=model.device), past_key_values=mine, use_cache=True)
            if number >= len(prompt.question_ids):
                layers = sorted(layer for layer in seen if layer >= 0)
                shares = torch.stack([seen[layer] for layer in layers])
                everywhere.append(shares.mean())
                where_looked.append(shares[heads[layers].to(shares.device)].mean())
    return {
        "answer_read": float(torch.stack(everywhere).mean()),
        "answer_read_where_looked_for": float(torch.stack(where_looked).mean()),
    }


@torch.inference_mode()
def look_into_alone(
    model: Any, name: str, policy: CachePolicy, prompts: list[NeedlePrompt], heads: torch.Tensor, budget: int
) -> dict[str, Any]:
    """The same of a policy that needs a pass of its own, or whose heads go by rules."""
    with read(model, (policy,), context_batch(prompts, model.device)) as reading:
        cut = reading.cache(0, budget if evicts(policy) else None)
        share = held(cut, prompts)
        row = {"answer_held": float(share.mean()), "answer_held_where_looked_for": float(share[heads].mean())}
        found = [recital.found for recital in recite(model, prompts, cut.fork(), steps=isinstance(policy, Select))]
        if isinstance(policy, Select):
            row |= answers_read(model, policy, cut, prompts, heads)
    by_depth = {str(depth): sum(f := found[n :: len(DEPTHS)]) / len(f) for n, depth in enumerate(DEPTHS)}
    row = {"prompts": len(prompts), "found": sum(found) / len(found), **row, "by_depth": by_depth}
    print(name, row, flush=True)
    return row


def others(length: int) -> list[tuple[str, CachePolicy]]:
    """Those of the quality benchmark that are not among the policies above, at half the cache."""
    found = [
        (one.name, one.policy)
        for one in contenders(length, alone=True)
        if one.name not in (*POLICIES, BY_TOKEN, "pyramid(snapkv)", "adaptive(snapkv)", "adaptive(a2sf)")
        and one.budget in (None, length // 2)
    ]
    return [*found, ("think(full)", vestige.method("think", ratio=0.5))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    model, tokenizer = vestige.models.load(given.model, dtype="float32", device=given.device)
    result: dict[str, Any] = {"length": given.length, "budget": (given.length + 1) // 2}
    if given.out.exists():
        result = json.loads(given.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder) / "repeated.txt"
        repeated.write_text(" ".join([REPEATED] * 400))
        for filler, haystack in (("all different", "grammar"), ("repeated", f"file:{repeated}")):
            prompts = [
                Needle(length=given.length, depth=depth, seed=seed, haystack=haystack).build(tokenizer)
                for seed in range(given.seeds)
                for depth in DEPTHS
            ]
            rows = result.setdefault(filler, {})
            if "looking heads" not in rows:
                heads = looking_heads(model, prompts[: len(DEPTHS)])
                rows["looking heads"] = heads.nonzero().tolist()
                rows.update(look_into(model, list(POLICIES), prompts, heads, result["budget"]))
                store(result, given.out)
            heads = torch.zeros(model.config.num_hidden_layers, model.config.num_key_value_heads, dtype=torch.bool)
            for layer, head in rows["looking heads"]:
                heads[layer, head] = True
            for name, policy in others(given.length):
                if name in rows:
                    continue
                try:
                    rows[name] = look_into_alone(model, name, policy, prompts, heads, result["budget"])
                except SpecError as error:  # a plan that was fitted on another model
                    print(f"left out: {error}")
                store(result, given.out)


def store(result: dict[str, Any], out: Path) -> None:
    """Write a file anew, or not at all."""
    write_whole(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
