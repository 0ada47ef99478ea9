"""What SmolLM2 still knows after its cache was cut: every evicting method and peer, into a ledger.

    python benchmarks/context/quality.py --out benchmarks/context/quality.jsonl

Three tasks at four lengths, three budgets, five seeds: a needle, a needle among others of its kind (both asked only
after the cache is cut), and the perplexity of the next 256 tokens of a long text. Policies that read few entries
while decoding answer token by token, all others in one pass over a cache that holds no more than the budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import vestige
from vestige.context.select.base import Select
from vestige.core.ledger import Ledger
from vestige.errors import SpecError
from vestige.evidence.data.text import passages
from vestige.evidence.tasks.needle import Needle, context_batch, recite

SCORES = ("streaming-llm", "h2o", "a2sf", "snapkv", "tova", "knorm", "expected-attention")
READERS = ("recycled-attention", "tidal-decode", "longheads")
SHARES = (0.5, 0.25, 0.1)
DEPTHS = (0.1, 0.5, 0.9)
CONTINUATION = 256


def policies(budget: int) -> Iterator[vestige.Method]:
    """Every method at a budget in tokens; one that asks for more is left out, and said to be."""
    plans = [(plan, name) for plan in ("pyramid", "adaptive") for name in ("snapkv", "a2sf")]
    for plan, name in [(None, name) for name in (*SCORES, *READERS)] + plans:
        try:
            policy = vestige.method(name, budget=budget)
            yield policy if plan is None else vestige.method(plan, policy=policy)
        except SpecError as error:
            print(f"left out: {error}")


def label(policy: vestige.Method) -> str:
    inner = getattr(policy, "policy", None)
    return policy.name if inner is None else f"{policy.name}({inner.name})"


def open_cache(model, kept, policy, ids, budget):
    """A cache that has read ``ids`` and holds, or will read, what the budget allows."""
    model(ids, use_cache=True, logits_to_keep=1)
    return kept.cache.fork() if isinstance(policy, Select) else kept.cache


def answer_in_steps(model, prompts, cache) -> list[float]:
    """Share of prompts whose answer comes out, fed token by token: policies that act while decoding do act."""
    found = []
    for row, prompt in enumerate(prompts):
        mine = cache.fork()
        mine.batch_select_indices(torch.tensor([row], device=model.device))
        said = []
        line = prompt.question_ids + prompt.answer_ids[:-1]
        for token in line:
            ids = torch.tensor([[token]], device=model.device)
            said.append(int(model(ids, past_key_values=mine, use_cache=True).logits[0, -1].argmax()))
        found.append(float(tuple(said[len(prompt.question_ids) - 1 :]) == prompt.answer_ids))
    return found


def perplexity(model, ids, cache, steps: bool) -> list[float]:
    """Of the continuation, per row."""
    inputs = ids[:, -CONTINUATION - 1 : -1]
    if steps:
        outs = [model(inputs[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(64)]
        logits, targets = torch.cat(outs, 1), ids[:, -CONTINUATION : -CONTINUATION + 64]
    else:
        logits, targets = model(inputs, past_key_values=cache, use_cache=True).logits, ids[:, -CONTINUATION:]
    loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return loss.mean(1).exp().tolist()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", action="store_true", help="also the policies that read few entries (slow)")
    args = parser.parse_args()
    model, tokenizer = vestige.models.load(device=args.device)
    ledger = Ledger(args.out)
    for length in args.lengths:
        seeds = range(args.seeds)
        places = [(k, seed, depth) for k in (0, 6) for seed in seeds for depth in DEPTHS]
        needles = [Needle(length=length, depth=depth, seed=seed, distractors=k) for k, seed, depth in places]
        prompts = [needle.build(tokenizer) for needle in needles]
        half = len(prompts) // 2
        text = passages(tokenizer, length + CONTINUATION, tuple(range(args.seeds))).to(model.device)
        budgets = [("full", vestige.method("full"), length)]
        for share in SHARES:
            budget = int(share * length)
            for policy in policies(budget):
                budgets.append((label(policy), policy, budget))
        for name, policy, budget in budgets:
            steps = isinstance(policy, Select)
            if steps and not args.steps:
                continue
            for task, some in (("needle", prompts[:half]), ("multi-key needle", prompts[half:])):
                key = f"{name} {budget} {task} {length}"
                if ledger.has(key):
                    continue
                with _once(policy).attach(model, graph=False) as kept:
                    cache = open_cache(model, kept, policy, context_batch(some, model.device), budget)
                    held = cache.nbytes // len(some)
                    if steps:
                        found = answer_in_steps(model, some, cache)
                    else:
                        cache.frozen = True
                        found = [float(recital.found) for recital in recite(model, some, cache)]
                size = len(DEPTHS)
                by_seed = [sum(found[seed * size : (seed + 1) * size]) / size for seed in seeds]
                _store(ledger, key, policy, name, task, length, budget, held, by_seed)
            key = f"{name} {budget} perplexity {length}"
            if ledger.has(key):
                continue
            with _once(policy).attach(model, graph=False) as kept:
                cache = open_cache(model, kept, policy, text[:, : -CONTINUATION - 1], budget)
                held = cache.nbytes // len(text)
                cache.frozen = not steps
                values = perplexity(model, text, cache, steps)
            _store(ledger, key, policy, name, "perplexity", length, budget, held, values)
        print(length, "done", flush=True)


def _once(policy: vestige.Method) -> vestige.Method:
    """The policy, with a drop at the end of the prompt alone where it has a schedule."""
    return policy.replace(when="prefill") if hasattr(policy, "when") else policy


def _store(ledger, key, policy, name, task, length, budget, held, by_seed) -> None:
    score = sum(by_seed) / len(by_seed)
    ledger.append(
        {
            "study": "quality",
            "method": policy.spec(),
            "model": "smollm2",
            "task": {"name": task, "length": length},
            "seed": len(by_seed),
            "metrics": {"policy": name, "budget": budget, "score": score, "by_seed": by_seed},
            "kv_bytes": held,
        },
        key=key,
    )
    print(f"{length:5} {name:28} {budget:5} {task:17} {score:.3f}", flush=True)


if __name__ == "__main__":
    main()
