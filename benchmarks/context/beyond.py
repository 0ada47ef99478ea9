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
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

import vestige
from vestige.context.policy import CachePolicy
from vestige.core.files import write_whole
from vestige.evidence.data.text import passages

COUNTED = 1024


def perplexity(model: Any, policy: CachePolicy | None, ids: torch.Tensor, chunk: int) -> float:
    """Of the last tokens of a text."""
    counted, losses = min(COUNTED, ids.shape[1] // 2), []
    with nullcontext() if policy is None else policy.attach(model) as kept:
        cache = transformers.DynamicCache() if kept is None else kept.new_cache()
        for first in range(0, ids.shape[1] - 1, chunk):
            logits = model(ids[:, first : first + chunk], past_key_values=cache, use_cache=True).logits[0]
            due = ids[0, first + 1 : first + 1 + chunk]
            losses.append(cross_entropy(logits[: len(due)].float(), due, reduction="none"))
    return float(torch.cat(losses)[-counted:].mean().exp())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 12288, 16384])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--pieces", type=int, default=16, help="chunks that make longheads' budget")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at a time")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    model, tokenizer = vestige.models.load(given.model, dtype="float32", device=given.device)
    policies = {
        "the model alone": None,
        "longheads": vestige.method("longheads", budget=given.budget, chunk=given.budget // given.pieces),
        "streaming-llm": vestige.method("streaming-llm", budget=given.budget),
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
    for length, seed, (name, policy) in itertools.product(given.lengths, given.seeds, policies.items()):
        about = {"length": length, "seed": seed, "policy": name}
        if any(about.items() <= row.items() for row in rows):
            continue
        if time.monotonic() > end:
            print(f"{given.minutes:g} minutes are over; the same command goes on from here")
            return
        ids = passages(tokenizer, length, (seed,)).to(model.device)
        began = time.perf_counter()
        seen = perplexity(model, policy, ids, given.chunk)
        rows.append(about | {"perplexity": round(seen, 4), "seconds": round(time.perf_counter() - began, 2)})
        write_whole(given.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
