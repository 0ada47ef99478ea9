"""The operators of the mixers against PyTorch's attention and flash-linear-attention, and chunks against single steps.

    python benchmarks/layers/speed.py --out benchmarks/layers/speed-h100.json            # on a CUDA device
    python benchmarks/layers/speed.py --out benchmarks/layers/speed-cpu.json --device cpu

On CUDA: bf16, 16 heads of 128, as many rows of each length as make 32k tokens. ``ours`` is what a layer runs, by
whichever kernel is chosen for it; ``own`` is the portable path; ``fla`` is flash-linear-attention called directly,
where it has the operator and does not refuse it. On a CPU: float32, 2k tokens, chunks against one step after another.
Every ratio of one file comes from one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vestige.layers.mixers.based import taylor_features
from vestige.layers.ops import fla
from vestige.layers.ops.recurrence import Drive, chunked, recurrence, step
from vestige.layers.ops.windowed_attention import windowed_attention

HEADS, DIM, TOKENS, WINDOW = 16, 128, 32768, 256


def drives(batch: int, length: int, device: str, dtype: torch.dtype, heads: int, dim: int) -> dict[str, Drive]:
    """What drives the recurrence of each mixer, at equal sizes."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, device=device, dtype=dtype)

    q, k, v = F.normalize(drawn(heads, dim), dim=-1), F.normalize(drawn(heads, dim), dim=-1), drawn(heads, dim)
    beta = torch.sigmoid(drawn(heads))
    by_token = F.logsigmoid(drawn(heads).float() + 3)
    by_channel = F.logsigmoid(drawn(heads, dim).float()) / 16
    fixed = -torch.logspace(-3, 0, heads, device=device)
    shared = F.normalize(drawn(1, dim), dim=-1)
    small = taylor_features(drawn(heads, 16))
    return {
        "linear-attention": Drive(q, k, v),
        "lightning-attention": Drive(q, k, v, fixed),
        "mamba2": Drive(shared, shared.flip(-1), v, by_token),
        "gla": Drive(q, k, v, by_channel),
        "delta-net": Drive(q, k, v, None, beta),
        "gated-delta-net": Drive(q, k, v, by_token, beta),
        "based": Drive(small, small.flip(1), v),
    }


def one_after_the_other(drive: Drive) -> tuple[Tensor, Tensor]:
    """The recurrence as a loop over tokens.

    Tensors are taken apart once: to index them anew for each token would make the backward pass quadratic.
    """
    batch, length, heads = drive.v.shape[:3]
    decay = drive.decay
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(batch, length, heads)
    parts = [drive.q, drive.k, drive.v, decay, drive.beta]
    columns = [[None] * length if t is None else t.unbind(1) for t in parts]
    state, read = None, []
    for at in zip(*columns, strict=True):
        out, state = step(Drive(*at, scale=drive.scale), state)
        read.append(out)
    assert state is not None
    return torch.stack(read, 1), state


def seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of a call."""
    spans = []
    for turn in range(repeats + min(3, repeats)):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= min(3, repeats):
            spans.append(time.perf_counter() - begin)
    return statistics.median(spans)


def both(function: Callable[[], Tensor], leaves: list[Tensor], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of the forward pass, and of forward and backward together."""

    def there_and_back() -> None:
        torch.autograd.grad(function().float().sum(), leaves)

    with torch.no_grad():
        forward = seconds(function, device, repeats)
    return {"forward_ms": 1e3 * forward, "both_ms": 1e3 * seconds(there_and_back, device, repeats)}


def leaf(drive: Drive) -> tuple[Drive, list[Tensor]]:
    """The drive with tensors that want a gradient; a decay fixed per head wants none."""
    parts = [drive.q, drive.k, drive.v, drive.decay, drive.beta]
    fresh = [None if t is None else t.detach().clone() for t in parts]
    leaves = [t.requires_grad_() for t in fresh if t is not None and t.dim() > 1]
    return Drive(*fresh, drive.scale), leaves  # type: ignore[arg-type]


def attention(batch: int, length: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """PyTorch's causal attention, and attention within a window."""
    q, k, v = (torch.randn(batch, HEADS, length, DIM, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    return {
        "softmax": lambda: (F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]),
        "sliding-window": lambda: (windowed_attention(q, k, v, window=WINDOW, scaling=DIM**-0.5), [q, k, v]),
    }


def on_cuda(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        batch = TOKENS // length
        found: dict[str, dict[str, float]] = {}
        for name, run in attention(batch, length, "cuda", torch.bfloat16).items():
            leaves = run()[1]
            found[name] = both(lambda run=run: run()[0], leaves, "cuda", repeats)  # type: ignore[misc]
            rows.append({"mixer": name, "path": "ours", "length": length, "batch": batch, **found[name]})
            print(rows[-1], flush=True)
        for name, drive in drives(batch, length, "cuda", torch.bfloat16, HEADS, DIM).items():
            drive, leaves = leaf(drive)
            paths: dict[str, Callable[[], Tensor]] = {
                "ours": lambda drive=drive: recurrence(drive)[0],  # type: ignore[misc]
                "own": lambda drive=drive: chunked(drive)[0],  # type: ignore[misc]
            }
            if fla.serves(drive):
                paths["fla"] = lambda drive=drive: fla.fla_recurrence(drive, None)[0]  # type: ignore[misc, index]
            for path, function in paths.items():
                measured = both(function, leaves, "cuda", repeats)
                over = {f"{k}_over_sdpa": v / found["softmax"][k] for k, v in measured.items()}
                row = {"mixer": name, "path": path, "length": length, "batch": batch, **measured, **over}
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            torch.cuda.empty_cache()
    return rows


def on_cpu(length: int, repeats: int, heads: int, dim: int) -> list[dict[str, Any]]:
    rows = []
    for name, drive in drives(1, length, "cpu", torch.float32, heads, dim).items():
        drive, leaves = leaf(drive)
        chunks = both(lambda drive=drive: chunked(drive)[0], leaves, "cpu", repeats)  # type: ignore[misc]
        steps = both(lambda drive=drive: one_after_the_other(drive)[0], leaves, "cpu", 1)  # type: ignore[misc]
        row = {"mixer": name, "length": length, "heads": heads, "dim": dim}
        row |= {f"chunks_{k}": v for k, v in chunks.items()} | {f"steps_{k}": v for k, v in steps.items()}
        row |= {f"steps_over_chunks_{k.removesuffix('_ms')}": steps[k] / chunks[k] for k in chunks}
        rows.append(row)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--heads", type=int, default=8, help="on a CPU")
    parser.add_argument("--dim", type=int, default=64, help="on a CPU")
    args = parser.parse_args()
    if args.device == "cuda":
        rows = on_cuda(args.lengths, args.repeats or 20)
    else:
        torch.set_num_threads(2)
        rows = on_cpu(2048, args.repeats or 3, args.heads, args.dim)
    packages = {p: metadata.version(p) for p in ("torch", "triton", "fla-core") if _has(p)}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "2 CPU threads",
        "packages": packages,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
