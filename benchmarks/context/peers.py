"""What is left after a cut: Vestige's policies beside kvpress's presses, the same prompts and budgets.

kvpress needs transformers below 5.3, so each side runs in an environment of its own; the first one writes the prompts
down for the other:

    python benchmarks/context/peers.py --side vestige --prompts prompts.json --out benchmarks/context/peers.json
    <other python> benchmarks/context/peers.py --side kvpress --prompts prompts.json --out benchmarks/context/peers.json

Three tasks, three budgets, five seeds: a needle that is asked for after the cut, one whose question stands at the end
of what is cut, and the perplexity of the 256 tokens that follow a text. Every policy is measured as it comes, float32
on both sides; rows are written as they come, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

PAIRS = {
    "snapkv": "SnapKVPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "expected-attention": "ExpectedAttentionPress",
    "streaming-llm": "StreamingLLMPress",
    "h2o": "ObservedAttentionPress",
    "pyramid": "PyramidKVPress",
    "adaptive": "AdaKVPress",
}
SHARES = (0.5, 0.25, 0.1)
DEPTHS = (0.1, 0.5, 0.9)
CONTINUATION = 256
LAST, SEEN, TEXT = "needle", "needle, question seen", "perplexity"
Prompt = dict[str, Any]
"""``task``, ``length``, ``seed``; ``context`` is cut, then ``line`` is read, of which ``answer`` counts."""


def prompts(tokenizer: Any, lengths: list[int], seeds: list[int]) -> Iterator[Prompt]:
    from vestige.evidence.data.text import passages
    from vestige.evidence.tasks.needle import Needle

    for length in lengths:
        for seed in seeds:
            about = {"length": length, "seed": seed}
            for depth in DEPTHS:
                needle = Needle(length=length, depth=depth, seed=seed).build(tokenizer)
                context, question, answer = map(list, (needle.context_ids, needle.question_ids, needle.answer_ids))
                yield about | {"task": LAST, "context": context, "line": question + answer[:-1], "answer": answer}
                context, question = context + question[:-1], question[-1:]
                yield about | {"task": SEEN, "context": context, "line": question + answer[:-1], "answer": answer}
            text = passages(tokenizer, length + CONTINUATION, (seed,))[0].tolist()
            answer = text[-CONTINUATION:]
            yield about | {"task": TEXT, "context": text[: -CONTINUATION - 1], "line": text[-CONTINUATION - 1 : -1],
                           "answer": answer}  # fmt: skip


def score(prompt: Prompt, logits: torch.Tensor) -> float:
    """Whether the answer comes out, or the perplexity of the text: ``logits`` are those of the line."""
    answer = torch.tensor(prompt["answer"], device=logits.device)
    said = logits[-len(answer) :]
    if prompt["task"] == TEXT:
        return float(torch.nn.functional.cross_entropy(said.float(), answer).exp())
    return float(torch.equal(said.argmax(-1), answer))


def vestige_side(model: Any, prompt: Prompt, lacks: Callable[[str, int], bool]) -> Iterator[tuple[str, int, float]]:
    import vestige
    from vestige.errors import SpecError
    from vestige.evidence.engine.reading import read, reading_groups

    device = model.device
    context, line = (torch.tensor([prompt[name]], device=device) for name in ("context", "line"))
    by_name = {name: vestige.method(name, budget=1.0) if name not in ("pyramid", "adaptive") else
               vestige.method(name, policy={"name": "snapkv", "budget": 1.0}) for name in PAIRS}  # fmt: skip
    budgets = [int(share * context.shape[1]) for share in SHARES]
    wanted = {policy: name for name, policy in by_name.items() if any(lacks(name, budget) for budget in budgets)}
    for group in reading_groups(wanted):
        with read(model, group, context) as reading:
            for place, policy in enumerate(group):
                for budget in budgets:
                    try:
                        cache = reading.cache(place, budget)
                    except SpecError as error:  # less than its window
                        print(f"left out: {error}")
                        continue
                    yield wanted[policy], budget, score(prompt, model(line, past_key_values=cache).logits[0])


def kvpress_side(model: Any, prompt: Prompt, lacks: Callable[[str, int], bool]) -> Iterator[tuple[str, int, float]]:
    import kvpress

    device = model.device
    context, line = (torch.tensor([prompt[name]], device=device) for name in ("context", "line"))
    count = context.shape[1]
    for name, press in PAIRS.items():
        for share in SHARES:
            budget = int(share * count)
            if not lacks(name, budget):
                continue
            ratio = 1 - (budget + 0.5) / count  # the half survives rounding
            cls = getattr(kvpress, press)
            inner = kvpress.SnapKVPress(compression_ratio=ratio)
            used = cls(inner) if press == "AdaKVPress" else cls(compression_ratio=ratio)
            eager = press == "ObservedAttentionPress"
            if eager:
                model.set_attn_implementation("eager")
            cache = transformers.DynamicCache()
            with used(model):
                model.model(input_ids=context, past_key_values=cache)
            # Layers of unequal length have no mask in common, and a single token needs none.
            blocks = line.split(1, dim=1) if press == "PyramidKVPress" else (line,)
            said, place = [], count
            for block in blocks:
                there = torch.arange(block.shape[1], device=device)
                held = cache.get_seq_length()
                said.append(
                    model(
                        block, past_key_values=cache, position_ids=(place + there)[None], cache_position=held + there
                    ).logits[0]
                )
                place += block.shape[1]
            logits = torch.cat(said)
            yield name, budget, score(prompt, logits)
            if eager:
                model.set_attn_implementation("sdpa")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("vestige", "kvpress"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="written by the first side, read by the other")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.side == "vestige":
        import vestige

        model, tokenizer = vestige.models.load(given.model, dtype="float32", device=given.device)
        asked = {"model": model.config._name_or_path, "prompts": list(prompts(tokenizer, given.lengths, given.seeds))}
        given.prompts.write_text(json.dumps(asked))
        work = vestige_side
    else:
        asked = json.loads(given.prompts.read_text())
        model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
        model.to(given.device)
        work = kvpress_side
    result: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    result |= {"model": given.model, "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    have = {
        (*map(row.get, ("side", "task", "length", "seed", "prompt", "policy", "budget")),) for row in result["rows"]
    }
    for number, prompt in enumerate(asked["prompts"]):
        about = {name: prompt[name] for name in ("task", "length", "seed")} | {"prompt": number % (2 * len(DEPTHS) + 1)}
        key = (given.side, *about.values())
        for name, budget, found in work(model, prompt, lambda name, budget, key=key: (*key, name, budget) not in have):
            row = {"side": given.side, **about, "policy": name, "budget": budget, "score": round(found, 4)}
            result["rows"].append(row | {"transformers": transformers.__version__})
        part = given.out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=None).replace('{"side"', '\n{"side"') + "\n")
        part.replace(given.out)
        print(given.side, about, f"{number + 1} of {len(asked['prompts'])}", flush=True)


if __name__ == "__main__":
    main()
