"""Compressing a prompt and decoding after it: Vestige beside kvpress, the same model, prompts and budget.

kvpress needs transformers below 5.3 and wraps every attention function when it is imported, so each side runs in
an environment of its own, on the same machine, one after the other, into one file:

    python benchmarks/context/compression.py --side vestige --out benchmarks/context/compression.json
    <other python> benchmarks/context/compression.py --side kvpress --out benchmarks/context/compression.json
    python benchmarks/context/compression.py --side scores --out benchmarks/context/compression.json

The third asks what scores cost by themselves: prompts of rising length read with everything kept, without scores and
with those of a2sf. A randomly initialised Llama-3.1-8B shape in bf16; seconds by device events, memory as the
allocator's peak. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from shape import SHAPE, build, seconds_of

BUDGET = 2048
NEW = 128
RISING = [8192, 16384, 32768, 65536]
PAIRS = {"snapkv": "SnapKVPress", "tova": "TOVAPress", "h2o": "ObservedAttentionPress"}


def measured(prefill, decode, repeats: int) -> dict[str, float]:
    """Median seconds of prefill and of the decoded tokens, and the peak of both."""
    spans, peaks = [], []
    for _ in range(repeats + 1):  # the first one compiles
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        state: list = []
        first = seconds_of(lambda state=state: state.append(prefill()))
        spans.append((first, seconds_of(lambda state=state: decode(state[0])) if decode else 0.0))
        peaks.append(torch.cuda.max_memory_allocated())
        state.clear()
    prompt, new = (statistics.median(span[i] for span in spans[1:]) for i in range(2))
    return {"prefill_s": prompt, "decode_s": new, "peak_gib": min(peaks[1:]) / 2**30}


def vestige_side(model, ids, repeats: int):
    import vestige

    def prefill():
        return model(ids, use_cache=True, logits_to_keep=1)

    def decode(output):
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        for _ in range(NEW):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)

    yield "none", measured(prefill, None, repeats)
    for name in ("a2sf", *PAIRS):
        policy = vestige.method(name, budget=BUDGET, when="prefill")
        with policy.attach(model) as kept:
            yield name, measured(prefill, decode, repeats)
            kept.cache = None


def scores_side(model, ids, repeats: int):
    import vestige

    for name, policy in (("full", vestige.method("full")), ("a2sf, all kept", vestige.method("a2sf", budget=1.0))):
        with policy.attach(model) as kept:
            yield name, measured(lambda: model(ids, use_cache=True, logits_to_keep=1), None, repeats)
            kept.cache = None


def kvpress_side(model, ids, repeats: int):
    import kvpress
    from transformers import DynamicCache

    def prefill_with(press):
        def prefill():
            cache = DynamicCache()
            if press is None:
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            with press(model):
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return prefill

    def decode(output):
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        for step in range(NEW):
            where = torch.full((1, 1), ids.shape[1] + step, device=ids.device)
            token = model(token, past_key_values=cache, position_ids=where, use_cache=True).logits[:, -1:].argmax(-1)

    yield "none", measured(prefill_with(None), None, repeats)
    for name, press in PAIRS.items():
        eager = press == "ObservedAttentionPress"
        if eager:
            model.set_attn_implementation("eager")
        ratio = 1 - BUDGET / ids.shape[1]
        try:
            yield name, measured(prefill_with(getattr(kvpress, press)(compression_ratio=ratio)), decode, repeats)
        except torch.cuda.OutOfMemoryError:
            yield name, {"error": "out of memory"}
        if eager:
            model.set_attn_implementation("sdpa")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = {"vestige": vestige_side, "kvpress": kvpress_side, "scores": scores_side}
    parser.add_argument("--side", choices=sides, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", help="of the prompts")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args()
    model = build(args.layers)
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": [row for row in before if row["side"] != args.side],
    }
    for length in args.lengths or (RISING if args.side == "scores" else [8192, 32768]):
        torch.manual_seed(length)
        ids = torch.randint(1, SHAPE["vocab_size"], (1, length), device="cuda")
        for name, figures in sides[args.side](model, ids, args.repeats):
            row = {"side": args.side, "policy": name, "prompt": length, "budget": BUDGET, "new": NEW, **figures}
            row["transformers"] = transformers.__version__
            result["rows"].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(args.out)


if __name__ == "__main__":
    main()
