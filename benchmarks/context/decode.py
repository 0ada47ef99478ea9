"""Decoding at a fixed budget against the bytes that must move, and against transformers' compiled static cache.

    python benchmarks/context/decode.py --out benchmarks/context/decode.json --peer

A randomly initialised Llama-3.1-8B shape in bf16. Every figure of one file comes from one run, and is written as it
comes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from shape import SHAPE, build, seconds_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import keep

from vestige.context.cache import KeptCache
from vestige.context.evict.a2sf import A2SF
from vestige.context.evict.full import Full
from vestige.context.evict.streaming_llm import StreamingLLM


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
    return statistics.median(seconds_of(function) for _ in range(repeats))


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
            positions = torch.arange(slots, device="cuda", dtype=torch.int32)
            positions[cache.policy.sinks :] += seen - slots
            layer.positions = positions.expand(batch, heads, slots).contiguous()
            if cache.policy.needs_attention:
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


def cases(model, context: int, budget: int, batches: list[int], peers: bool):
    """``(name, batch, entries held, measure)``, what matters most first."""
    a2sf, streaming = A2SF(budget=budget), StreamingLLM(budget=budget)
    crowd = context - 1025

    def decode(name, policy, batch, held, **options):
        return name, batch, held, lambda: ours(model, policy, batch, max(held, context), held, **options)

    def static(batch, length, repeats=20):
        return "compiled static cache", batch, length, lambda: peer(model, batch, length, repeats)

    yield decode("a2sf, compiled", a2sf, batches[0], budget, compile=True)
    yield decode("a2sf, compiled", a2sf, batches[-1], budget, compile=True)
    yield "full, graph", 12, crowd, lambda: ours(model, Full(), 12, crowd, crowd, 10, graph=True)
    if peers:
        yield static(1, context)
        yield static(12, context, 5)
    yield decode("streaming-llm, compiled", streaming, batches[0], budget, compile=True)
    for batch in (batch for batch in batches if batch <= 16):
        yield decode("a2sf", a2sf, batch, budget)
        yield decode("streaming-llm", streaming, batch, budget)
    yield decode("full, graph", Full(), 1, context, graph=True)
    yield decode("plain loop, a2sf", a2sf, 1, budget, repeats=10, graph=False)
    if peers:
        yield static(1, budget)
    for batch in batches[1:-1]:
        yield decode("a2sf, compiled", a2sf, batch, budget, compile=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128, 192])
    args = parser.parse_args()
    model = build(args.layers)
    config = model.config
    bandwidth = copy_bandwidth()
    head = config.vocab_size * config.hidden_size * 2
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters()) - head
    )  # the embedding is looked up, not read
    entry = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2 * args.layers
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "shape": {**SHAPE, "num_hidden_layers": args.layers},
        "rows": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, batch, held, measure in cases(model, args.context, args.budget, args.batches, args.peer):
        try:
            seconds, peak = measure()
        except torch.cuda.OutOfMemoryError:
            print(f"{name}, batch {batch}: out of memory")
            seconds = None
        gc.collect()
        torch.cuda.empty_cache()
        if seconds is None:
            continue
        floor = (weights + batch * held * entry) / bandwidth
        row = {
            "what": name,
            "batch": batch,
            "held": held,
            "ms": 1e3 * seconds,
            "floor_ms": 1e3 * floor,
            "over_floor": seconds / floor,
            "tokens_per_second": batch / seconds,
            "peak_gib": peak / 2**30,
        }
        result["rows"].append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        keep(args.out, result)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s in all")
