"""Past the length that a model was trained on: how well SmolLM2 (8,192 positions) reads on, with and without longheads.

    python benchmarks/context/beyond.py --out benchmarks/context/beyond.json

A text is read in chunks, and the perplexity of its last 1,024 tokens taken: by the model alone, which meets distances
that it has never seen, by longheads, which keeps every distance below its budget, and by streaming-llm, which does so
by forgetting. Seconds are those of the whole reading; other work on the machine falls on them. Rows are written as they
come; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, keep

import vestige
from vestige.context.policy import CachePolicy
from vestige.evidence.data.text import passages

COUNTED = 1024

FIRST = "Somewhere in this text a pass key is told. Keep it in mind."
LINE = " Rain falls on the roof. A cart rolls down the lane. The bell rings at noon. Bread lies on the table."
KEY = " The pass key is {key}. Keep it in mind: {key} is the pass key."
LAST = " What is the pass key? The pass key is"


@contextmanager
def reading(model: Any, policy: CachePolicy | None) -> Iterator[transformers.Cache]:
    """The cache that the model reads with."""
    with nullcontext() if policy is None else policy.attach(model) as kept:
        yield transformers.DynamicCache() if kept is None else kept.new_cache()


def perplexity(model: Any, tokenizer: Any, policy: CachePolicy | None, length: int, seed: int, chunk: int) -> float:
    """Of the last tokens of a text."""
    ids = passages(tokenizer, length, (seed,)).to(model.device)
    counted, losses = min(COUNTED, ids.shape[1] // 2), []
    with reading(model, policy) as cache:
        for first in range(0, ids.shape[1] - 1, chunk):
            logits = model(ids[:, first : first + chunk], past_key_values=cache, use_cache=True).logits[0]
            due = ids[0, first + 1 : first + 1 + chunk]
            losses.append(cross_entropy(logits[: len(due)].float(), due, reduction="none"))
    return round(float(torch.cat(losses)[-counted:].mean().exp()), 4)


def pass_key(model: Any, tokenizer: Any, policy: CachePolicy | None, length: int, seed: int, chunk: int) -> bool:
    """Whether the key is told, digit by digit, by the likeliest tokens."""
    chance = random.Random(seed)
    key, depth = str(chance.randint(10_000, 99_999)), chance.uniform(0.0, 0.6)
    first, line, told, last, answer = (
        tokenizer(part.format(key=key), add_special_tokens=False)["input_ids"]
        for part in (FIRST, LINE, KEY, LAST, " {key}")
    )
    lines = (length - len(first) - len(told) - len(last)) // len(line)
    before = int(lines * depth)
    ids = torch.tensor([first + line * before + told + line * (lines - before) + last], device=model.device)
    said: list[int] = []
    with reading(model, policy) as cache:
        for part in ids.split(chunk, dim=1):
            logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        while said == answer[: len(said)] and len(said) < len(answer):
            token = logits[:, -1].argmax(-1, keepdim=True)
            said.append(int(token))
            logits = model(token, past_key_values=cache, use_cache=True).logits
    return said == answer


TASKS = {"perplexity": perplexity, "pass key": pass_key}
POLICIES = ("the model alone", "longheads", "streaming-llm")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 12288, 16384])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--pieces", type=int, default=16, help="chunks that make longheads' budget")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at a time")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    clock = Clock(given.minutes)
    model, tokenizer = vestige.models.load(given.model, dtype="float32", device=given.device)
    alone, longheads, window = POLICIES
    policies: dict[str, Any] = {
        alone: None,
        longheads: vestige.method(longheads, budget=given.budget, chunk=given.budget // given.pieces),
        window: vestige.method(window, budget=given.budget),
    }
    facts = {
        "model": given.model,
        "positions": model.config.max_position_embeddings,
        "budget": given.budget,
        "chunks": given.pieces,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
    }
    before = json.loads(given.out.read_text()) if given.out.exists() else facts
    if {name: before[name] for name in facts} != facts:
        raise SystemExit(f"{given.out} comes from another machine, version or budget; write to another file")
    rows: list[dict[str, Any]] = before.get("rows", [])
    for task, length, seed, name in itertools.product(given.tasks, given.lengths, given.seeds, given.policies):
        about = {"task": task, "length": length, "seed": seed, "policy": name}
        if any(about.items() <= row.items() for row in rows):
            continue
        if clock.over:
            print(f"{given.minutes:g} minutes are over; the same command goes on from here")
            return
        began = time.perf_counter()
        seen = TASKS[task](model, tokenizer, policies[name], length, seed, given.chunk)
        rows.append(about | {"seen": seen, "seconds": round(time.perf_counter() - began, 2)})
        keep(given.out, facts | {"rows": rows})
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
