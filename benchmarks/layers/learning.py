"""Memories that learn while they read: whole texts against single tokens, and Titans' memory beside titans-pytorch.

    python benchmarks/layers/learning.py --out benchmarks/layers/learning-cpu.json
    python benchmarks/layers/learning.py --peer FOLDER --out benchmarks/layers/titans-cpu.json

Every registered mixer of the kind, as a layer: float32, one thread, seconds of
the processor (so that other work on the machine does not count). ``steps`` are timed over a few tokens after some that
fill the state: a token costs the same wherever it stands. ``--peer`` names folders in which titans-pytorch and what it
needs are unpacked; its memory has the same width, heads and layers, takes slopes at the same places, and is timed with
gates per token, as ours, and with its coarser gates per block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vestige.core.registry import registry
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.mixers.learning import LearningMixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState
from vestige.models.blocks import names_of


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Median of the processor's time, after one call to warm up."""
    spans = []
    for _ in range(repeats + 1):
        begin = time.process_time()
        function()
        spans.append(time.process_time() - begin)
    return 1e3 * statistics.median(spans[1:])


def both(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of the forward pass, and of forward and backward together."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        forward = milliseconds(lambda: run(x), repeats)
    return {
        "forward_ms": forward,
        "both_ms": milliseconds(lambda: torch.autograd.grad(run(leaf).sum(), leaf), repeats),
    }


def one_by_one(layer: torch.nn.Module, start: LayerState) -> Callable[[Tensor], Tensor]:
    """Tokens through a layer one after the other, each with the state that the last one left."""

    def run(x: Tensor) -> Tensor:
        state = start.fork()
        outputs = [layer(t[:, None], Layout.of(1, 1, past=state.seen), state) for t in x.unbind(1)]
        return torch.cat(outputs, 1)

    return run


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    mixer: Any = registry.load(name)()
    mixer = mixer.replace(refresh=args.refresh)
    size = args.heads * args.dim
    layer = mixer.build(Place(hidden_size=size, heads=args.heads, context=args.length))
    x = torch.randn(1, args.length, size)
    start = LayerState()
    with torch.no_grad():
        layer(x[:, : args.refresh], Layout.of(1, args.refresh), start)
    chunks = both(lambda t: layer(t, Layout.of(1, t.shape[1])), x, args.repeats)
    steps = both(one_by_one(layer, start), x[:, : args.steps], args.repeats)
    row: dict[str, Any] = {"mixer": name, "state_bytes": start.nbytes}
    for kind in chunks:
        here, there = chunks[kind] / args.length, steps[kind] / args.steps
        row[f"chunks_{kind}_per_token"], row[f"steps_{kind}_per_token"] = here, there
        row[f"steps_over_chunks_{kind.removesuffix('_ms')}"] = there / here
    return row


def beside_peer(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Titans' memory here and in titans-pytorch, in turn."""
    sys.path += args.peer
    home = next(Path(folder) / "titans_pytorch" for folder in args.peer if (Path(folder) / "titans_pytorch").is_dir())
    package = types.ModuleType("titans_pytorch")  # its front door imports more than the memory needs
    package.__path__ = [str(home)]
    sys.modules["titans_pytorch"] = package
    peers = importlib.import_module("titans_pytorch.neural_memory")
    models = importlib.import_module("titans_pytorch.memory_models")
    size = args.heads * args.dim
    x = torch.randn(1, args.length, size)
    own: Any = registry.load("titans")()
    layer = own.replace(refresh=args.refresh, conv=0).build(Place(hidden_size=size, heads=args.heads))
    rows = [{"memory": "vestige", **both(lambda t: layer(t, Layout.of(1, t.shape[1])), x, args.repeats)}]
    for gates, chunk in (("per token", 1), ("per block", args.refresh)):
        network = models.MemoryMLP(args.dim, depth=2, expansion_factor=4.0)
        settings = {"dim": size, "dim_head": args.dim, "heads": args.heads, "model": network}
        peer = peers.NeuralMemory(chunk_size=chunk, batch_size=args.refresh, **settings)
        found = both(lambda t, peer=peer: peer(t)[0], x, args.repeats)
        ratios = {f"{kind.removesuffix('_ms')}_over_vestige": ms / rows[0][kind] for kind, ms in found.items()}
        rows.append({"memory": f"titans-pytorch, gates {gates}", **found, **ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--peer", nargs="*", default=[], help="folders of titans-pytorch and what it needs")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--refresh", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {name: getattr(args, name) for name in ("length", "steps", "heads", "dim", "refresh", "repeats")}
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU, one thread, processor time",
        "packages": {"torch": metadata.version("torch")},
        **sizes,
        "rows": [],
    }
    if args.peer:
        result["rows"] = beside_peer(args)
        print(json.dumps(result["rows"], indent=1))
    else:
        every = [name for name in names_of(Mixer) if issubclass(registry.load(name), LearningMixer)]
        for name in args.only or every:
            result["rows"].append(measured(name, args))
            print(json.dumps(result["rows"][-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(args.out)


if __name__ == "__main__":
    main()
