"""Why a policy finds a needle or not: what of the answer it keeps, and in which heads.

    python benchmarks/context/why.py --out benchmarks/context/why.json

Contexts of 507 tokens are cut to half before the question is known, in two kinds of filler: sentences that all differ,
and five sentences over and over. For each policy: how often the whole answer comes out, what share of the answer's
tokens is held over all heads, and what share in those that look at the answer when it is asked for. Then the same once
more with the answer's tokens kept by force: whether it is their loss alone that costs the answer.

Results are kept as they come; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import vestige
from vestige.context.cache import KeptCache
from vestige.context.policy import CachePolicy
from vestige.context.together import Together
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
                "found": sum(found) / len(found),
                "answer_held": float(share.mean()),
                "answer_held_where_looked_for": float(share[heads].mean()),
                "found_with_answer_kept": sum(by_force) / len(by_force),
                "by_depth": {str(d): sum(f := found[n :: len(DEPTHS)]) / len(f) for n, d in enumerate(DEPTHS)},
            }
            print(name, rows[name], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    model, tokenizer = vestige.models.load(given.model, dtype="float32", device=given.device)
    result = (
        json.loads(given.out.read_text())
        if given.out.exists()
        else {"length": given.length, "budget": (given.length + 1) // 2}
    )
    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder) / "repeated.txt"
        repeated.write_text(" ".join([REPEATED] * 400))
        for filler, haystack in (("all different", "grammar"), ("repeated", f"file:{repeated}")):
            prompts = [
                Needle(length=given.length, depth=depth, seed=seed, haystack=haystack).build(tokenizer)
                for seed in range(given.seeds)
                for depth in DEPTHS
            ]
            if filler in result:
                continue
            heads = looking_heads(model, prompts[: len(DEPTHS)])
            rows = result[filler] = {"looking heads": heads.nonzero().tolist()}
            rows.update(look_into(model, list(POLICIES), prompts, heads, result["budget"]))
            part = given.out.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(given.out)


if __name__ == "__main__":
    main()
