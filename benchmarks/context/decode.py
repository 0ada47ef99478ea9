"""Decoding at a fixed budget against the bytes that must move, and against transformers' compiled static cache.

    python benchmarks/context/decode.py --out benchmarks/context/decode.json [--peer] [--compile]

A randomly initialised Llama-3.1-8B shape in bf16. Every figure of one file comes from one run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from shape import SHAPE, build

from vestige.context.cache import KeptCache
from vestige.context.evict.a2sf import A2SF
from vestige.context.evict.full import Full


def copy_bandwidth() -> float:
    """Bytes per second that a large device-to-device copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 20)
    return 2 * source.numel() / seconds


def timed(function, repeats: int) -> float:
    """Median seconds of a call, by device events."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    spans = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(spans)


def fill(cache: KeptCache, batch: int, seen: int, slots: int, config, dtype=torch.bfloat16) -> KeptCache:
    """Entries at random, as if ``seen`` tokens had been read and ``slots`` kept."""
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.real = [seen] * batch
    for layer in cache.layers:
        layer.lazy_initialization(*(torch.empty(batch, heads, 0, dim, device="cuda", dtype=dtype) for _ in range(2)))
        layer.keys = torch.randn(batch, heads, slots, dim, device="cuda", dtype=dtype)
        layer.values = torch.randn(batch, heads, slots, dim, device="cuda", dtype=dtype)
        layer.seen = seen
        if slots < seen:
            layer.positions = (
                (torch.arange(slots, device="cuda", dtype=torch.int32) + seen - slots)
                .expand(batch, heads, slots)
                .contiguous()
            )
            layer.state["mass"] = torch.rand(batch, heads, slots, device="cuda")
    return cache


@torch.no_grad()
def ours(model, policy, batch, seen, slots, repeats=30, graph=True, compile=False) -> tuple[float, float]:
    """Seconds a step, and peak bytes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with policy.attach(model, graph=graph, compile=compile) as kept:
        cache = fill(kept.new_cache(), batch, seen, slots, model.config)
        ids = torch.ones(batch, 1, dtype=torch.long, device="cuda")
        seconds = timed(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True), repeats)
        peak = torch.cuda.max_memory_allocated()
        del cache
        kept.cache = None
    torch.cuda.empty_cache()
    return seconds, peak


@torch.no_grad()
def peer(model, batch: int, context: int, repeats: int = 20) -> tuple[float, float]:
    """transformers' StaticCache with a compiled forward (reduce-overhead, full graph)."""
    from transformers import StaticCache

    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cache = StaticCache(config=model.config, max_cache_len=context)
    heads, dim = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(batch, heads, dim, torch.bfloat16, torch.device("cuda"))
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    ids = torch.ones(batch, 1, dtype=torch.long, device="cuda")
    at = torch.full((batch, 1), context - 64, device="cuda")
    where = torch.tensor([context - 64], device="cuda")

    def run():
        kwargs = {"cache_position": where} if transformers.__version__ < "5.2" else {}
        step(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, **kwargs)

    seconds = timed(run, repeats)
    peak = torch.cuda.max_memory_allocated()
    del cache, step
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 128, 192])
    args = parser.parse_args()
    model = build(args.layers)
    config = model.config
    bandwidth = copy_bandwidth()
    head = config.vocab_size * config.hidden_size * 2
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters()) - head
    )  # the embedding is looked up, not read
    entry = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2 * args.layers

    def floor(batch: int, held: int) -> float:
        return (weights + batch * held * entry) / bandwidth

    rows = []

    def record(name: str, batch: int, held: int, seconds: float, peak: float) -> None:
        row = {
            "what": name,
            "batch": batch,
            "held": held,
            "ms": 1e3 * seconds,
            "floor_ms": 1e3 * floor(batch, held),
            "over_floor": seconds / floor(batch, held),
            "tokens_per_second": batch / seconds,
            "peak_gib": peak / 2**30,
        }
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    policy = A2SF(budget=args.budget)
    for batch in args.batches:
        try:
            if batch <= 16:
                record("a2sf", batch, args.budget, *ours(model, policy, batch, args.context, args.budget))
            fused = ours(model, policy, batch, args.context, args.budget, compile=True)
            record("a2sf, compiled", batch, args.budget, *fused)
        except torch.cuda.OutOfMemoryError:
            print("out of memory at batch", batch)
        gc.collect()
        torch.cuda.empty_cache()
    record("full, graph", 1, args.context, *ours(model, Full(), 1, args.context, args.context))
    try:
        record("full, graph", 12, args.context, *ours(model, Full(), 12, args.context - 1025, args.context - 1025, 10))
    except torch.cuda.OutOfMemoryError:
        print("full at batch 12: out of memory")
        torch.cuda.empty_cache()
    record("eager", 1, args.budget, *ours(model, policy, 1, args.context, args.budget, 10, graph=False))
    if args.peer:
        record("compiled static cache", 1, args.budget, *peer(model, 1, args.budget))
        record("compiled static cache", 1, args.context, *peer(model, 1, args.context))
        record("compiled static cache", 12, args.context, *peer(model, 12, args.context, 5))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "shape": {**SHAPE, "num_hidden_layers": args.layers},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s in all")
