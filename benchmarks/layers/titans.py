"""Titans' memory beside titans-pytorch, at equal sizes.

    python benchmarks/layers/titans.py --peer FOLDER --out benchmarks/layers/titans-h100.json
    python benchmarks/layers/titans.py --peer FOLDER --out benchmarks/layers/titans-cpu.json --device cpu

``--peer`` names the folder (or folders) in which titans-pytorch, assoc-scan, tensordict, einx, einops, frozendict,
pyvers and cloudpickle are unpacked. Its memory has the same width, heads and layers, and takes slopes at the same
places, after every ``--refresh`` tokens. It is timed with gates and answers per token, as ours, and with its coarser
ones per block. Forward, forward and backward together, and on CUDA the bytes at the peak of the latter; both take turns
at each size. What is larger than the device is recorded as such.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, Sheet, Watch, arguments, attempt, given, here, run_whole, still_there
from torch import Tensor, nn

from vestige.core.registry import registry
from vestige.layers.place import Place

OURS = "vestige"
SIZES = {"cuda": [(16, 64), (16, 128)], "cpu": [(4, 32)]}  # heads and their width
KINDS = ("forward", "both")
LENGTHS = {"cuda": [2048, 4096, 8192], "cpu": [1024]}


def ours(heads: int, dim: int, refresh: int) -> nn.Module:
    """The layer of ``titans``, without its convolution, which the peer lacks."""
    mixer: Any = registry.load("titans")()
    return mixer.replace(refresh=refresh, conv=0).build(Place(hidden_size=heads * dim, heads=heads))


def peers(folders: list[str]) -> Callable[[int, int, int, int], nn.Module]:
    """What builds titans-pytorch's memory, from heads, their width, tokens per gate and tokens per block."""
    sys.path += folders
    home = next(Path(folder) / "titans_pytorch" for folder in folders if (Path(folder) / "titans_pytorch").is_dir())
    package = types.ModuleType("titans_pytorch")  # its front door imports more than the memory needs
    package.__path__ = [str(home)]
    sys.modules["titans_pytorch"] = package
    memories = importlib.import_module("titans_pytorch.neural_memory")
    models = importlib.import_module("titans_pytorch.memory_models")

    def build(heads: int, dim: int, gate: int, refresh: int) -> nn.Module:
        network = models.MemoryMLP(dim, depth=2, expansion_factor=4.0)
        settings = {"dim": heads * dim, "dim_head": dim, "heads": heads, "model": network}
        return memories.NeuralMemory(chunk_size=gate, batch_size=refresh, **settings)

    return build


def forms(args: argparse.Namespace) -> dict[str, tuple[Callable[[int, int], nn.Module], Callable[..., Tensor]]]:
    """What is compared, by name: how it is built, and how it is run."""
    build = peers(args.peer)
    return {
        OURS: (lambda heads, dim: ours(heads, dim, args.refresh), run_whole),
        "titans-pytorch, gates per block": (
            lambda heads, dim: build(heads, dim, args.refresh, args.refresh),
            lambda memory, x: memory(x)[0],
        ),
        "titans-pytorch, gates per token": (
            lambda heads, dim: build(heads, dim, 1, args.refresh),
            lambda memory, x: memory(x)[0],
        ),
    }


def main() -> None:
    parser = arguments(__doc__, "seconds after which a call is not repeated; default: 2")
    parser.set_defaults(cap=2.0)
    parser.add_argument("--peer", nargs="+", required=True, help="folders of titans-pytorch and what it needs")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--refresh", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = given(parser)
    packages = ("triton", "titans-pytorch", "tensordict", "assoc-scan")
    compared = forms(args)
    head = {**here(args.device, *packages), "refresh": args.refresh, "batch": args.batch}
    sheet, clock, watch = Sheet(args.out, head), Clock(args.minutes), Watch(args.device, args.repeats, args.cap)
    types_ = [torch.float32, torch.bfloat16] if args.device == "cuda" else [torch.float32]
    for dtype in types_:
        for length in args.lengths or LENGTHS[args.device]:
            for heads, dim in SIZES[args.device]:
                for memory, (build, run) in compared.items():
                    at = {"heads": heads, "dim": dim, "length": length, "dtype": str(dtype).removeprefix("torch.")}
                    if clock.over:
                        return
                    if sheet.has(**at, memory=memory):
                        continue

                    def measure(at=at, build=build, run=run, dtype=dtype) -> dict[str, Any]:
                        layer = build(at["heads"], at["dim"]).to(args.device, dtype)
                        size = (args.batch, at["length"], at["heads"] * at["dim"])
                        x = torch.randn(*size, device=args.device, dtype=dtype, requires_grad=True)
                        return watch.both(lambda: run(layer, x), [x, *layer.parameters()])

                    found = attempt(measure)
                    base = next((r for r in sheet.rows if all(r[k] == v for k, v in at.items())), {})
                    if memory != OURS:
                        kinds = [kind for kind in KINDS if found.get(f"{kind}_ms") and base.get(f"{kind}_ms")]
                        found |= {f"{kind}_over_vestige": found[f"{kind}_ms"] / base[f"{kind}_ms"] for kind in kinds}
                    sheet.add({"memory": memory, **at, **found})
                    still_there(args.device)


if __name__ == "__main__":
    main()
