"""Selective synaptic dampening beside its authors' loop: seconds, memory, and whether the weights end up the same.

    git clone https://github.com/if-loops/selective-synaptic-dampening PEER
    python benchmarks/weights/ssd.py --peer PEER                        # ssd-cpu.json beside this script
    python benchmarks/weights/ssd.py --peer PEER --device cuda --images 5000 --batch 64 --repeats 1

A vision transformer of ten million weights, images of 28 x 28, a tenth of them to forget; float32, alpha 3, lambda 1.
Both sides are given the same rows as tensors and take turns; medians of whole erasures count, on a CPU in time of the
processor (so that other work on the machine does not count), one thread unless more are asked for. Twice: with the
Fisher information of single rows, which the paper defines and which the authors' loop gives with batches of one; and
with squared means of batches, as their experiments run it. A row's cost does not depend on how many rows there are, but
on how many patches an image is cut into: few leave a batch of one to wait for memory, many keep the processor busy.

Memory is looked at in a process of its own, both sides in one call: the most that is held while erasing (alpha chosen
automatically, which needs the most), in copies of the weights, these included; with batches of one it is what the
method itself holds. On a CPU the allocator is asked to give back at once what is freed. On a GPU the most that was held
while the time was taken is noted too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from common import Clock, Sheet, here, options
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import vestige

SIZES = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
IMAGES = {"image_size": 28, "num_channels": 1, "num_labels": 10}
ALPHA, DAMPENING = 3.0, 1.0
CLASS = 3
ESTIMATORS = ("per-example", "batch-mean")


def new_model(device: str, patch: int, **sizes: int) -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{**SIZES, **sizes}, **IMAGES, patch_size=patch)).eval().to(device)


def sets(images: int) -> tuple[TensorDataset, TensorDataset]:
    """Images that look like noise, and labels; the first tenth is of one class, which is to be forgotten."""
    draw = torch.Generator().manual_seed(0)
    side = IMAGES["image_size"]
    x = torch.rand(images, 1, side, side, generator=draw)
    few = images // 10
    y = (CLASS + torch.randint(1, IMAGES["num_labels"], (images,), generator=draw)) % IMAGES["num_labels"]
    y[:few] = CLASS
    return TensorDataset(x[:few], y[:few]), TensorDataset(x[few:], y[few:])


def ours(model: Any, forget: TensorDataset, retain: TensorDataset, estimator: str, batch: int, alpha: Any) -> None:
    method = vestige.method("ssd", alpha=alpha, dampening=DAMPENING, estimator=estimator)
    method.erase(model, forget=forget, retain=retain, batch_size=batch)


class Logits(nn.Module):
    """A model that answers with logits, as the authors' code expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def authors(folder: Path) -> Any:
    """Their module; what it imports for other parts of their experiments and is not installed here is left empty."""
    if not (folder / "src" / "ssd.py").is_file():
        raise SystemExit(f"{folder} holds no src/ssd.py; give a clone of if-loops/selective-synaptic-dampening")
    for name in ("torchvision", "wandb", "seaborn", "matplotlib.pyplot", "tqdm"):
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec(name) is not None:
                continue
        stand_in: Any = types.ModuleType(name)
        stand_in.datasets = stand_in.models = stand_in.transforms = None
        sys.modules[name] = stand_in
    found = importlib.util.spec_from_file_location("authors_ssd", folder / "src" / "ssd.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def theirs(peer: Any, model: Any, forget: TensorDataset, retain: TensorDataset, batch: int, device: str) -> None:
    """Importance on the rows to forget, importance on all, dampening: as their strategy calls it."""
    settings = dict.fromkeys(("magnitude_diff", "forget_threshold")) | {"lower_bound": 1, "exponent": 1}
    settings |= {"min_layer": -1, "max_layer": -1, "dampening_constant": DAMPENING, "selection_weighting": ALPHA}
    wrapped = Logits(model).eval()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    parts = [torch.cat(pair) for pair in zip(forget.tensors, retain.tensors, strict=True)]
    loaders = [
        DataLoader(TensorDataset(x, y, y), batch_size=batch, shuffle=shuffle)
        for (x, y), shuffle in ((forget.tensors, False), (parts, False))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        perturber = peer.ParameterPerturber(wrapped, optimizer, device, settings)
    found, every = (perturber.calc_importance(loader) for loader in loaders)
    perturber.modify_weight(every, found)
    optimizer.zero_grad()


def seconds(work: Callable[[], None], device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def timed(peer: Any, estimator: str, patch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn, from the same weights each time."""
    forget, retain = sets(args.images)
    batch = {"vestige": args.batch, "authors": 1 if estimator == "per-example" else args.batch}
    model = new_model(args.device, patch)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    spans: dict[str, list[float]] = {"vestige": [], "authors": []}
    more: dict[str, list[int]] = {"vestige": [], "authors": []}
    weights = sum(p.nbytes for p in model.parameters())
    ends = {}
    works: dict[str, Callable[[], None]] = {
        "vestige": lambda: ours(model, forget, retain, estimator, args.batch, ALPHA),
        "authors": lambda: theirs(peer, model, forget, retain, batch["authors"], args.device),
    }
    small = sets(10)
    ours(model, *small, estimator, 4, ALPHA)  # the first call of anything costs more
    theirs(peer, model, *small, 4, args.device)
    for _ in range(args.repeats):
        for side, work in works.items():
            model.load_state_dict(start)
            with highest(args.device, more[side]) if args.device == "cuda" else contextlib.nullcontext():
                spans[side].append(seconds(work, args.device))
            ends[side] = torch.cat([p.detach().flatten() for p in model.parameters()])
    medians = {side: statistics.median(found) for side, found in spans.items()}
    a, b = ends["vestige"], ends["authors"]
    moved = b != torch.cat([start[name].flatten() for name, _ in model.named_parameters()])
    same = (a - b).abs() <= 1e-5 * b.abs().clamp(min=1e-6)
    held = {f"{side}_copies": 1 + max(most) / weights for side, most in more.items()} if args.device == "cuda" else {}
    return {
        "tokens": (IMAGES["image_size"] // patch) ** 2 + 1,
        "batch": batch,
        **{f"{side}_s": value for side, value in medians.items()},
        "authors_over_vestige": medians["authors"] / medians["vestige"],
        "ms_per_image": {side: 1e3 * value / args.images for side, value in medians.items()},
        "dampened_by_authors": float(moved.float().mean()),
        "weights_that_agree": float(same.float().mean()),
        **held,
    }


@contextlib.contextmanager
def highest(device: str, found: list[int]) -> Iterator[None]:
    """The most bytes held inside the block more than before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    process, over = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    found.append(most - before)


def look_at_memory(args: argparse.Namespace) -> None:
    """In a process of its own: print what one side held."""
    side, estimator, batch = args.memory[0], args.memory[1], int(args.memory[2])
    model = new_model(args.device, max(args.patches))
    forget, retain = sets(4 * batch if batch > 1 else 20)
    weights = sum(p.nbytes for p in model.parameters())
    peer = authors(args.peer) if side == "authors" else None

    def work(on: Any) -> None:
        if peer is None:
            ours(on, forget, retain, estimator, batch, None)
        else:
            theirs(peer, on, forget, retain, batch, args.device)

    # What libraries load when they are first called is not held for the model.
    work(new_model(args.device, max(args.patches), hidden_size=12, intermediate_size=12, num_hidden_layers=1))
    more: list[int] = []
    with highest(args.device, more):
        work(model)
    tokens = (IMAGES["image_size"] // max(args.patches)) ** 2 + 1
    print(json.dumps({"tokens": tokens, "copies": 1 + more[0] / weights, "weights_bytes": weights}))


def memory(side: str, estimator: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--peer", str(args.peer), "--device", args.device]
    command += [
        "--threads",
        str(args.threads),
        "--patches",
        *map(str, args.patches),
        "--memory",
        side,
        estimator,
        str(batch),
    ]
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=given_back).stdout.splitlines()[-1]
    return json.loads(said)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="a clone of the authors' repository")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 7, 14], help="sides of the patches")
    parser.add_argument("--estimators", choices=ESTIMATORS, nargs="+", default=ESTIMATORS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        look_at_memory(args)
        return
    peer = authors(args.peer)
    weights = sum(p.numel() for p in new_model("cpu", 4).parameters())
    out = args.out or Path(__file__).with_name(f"ssd-{args.device}.json")
    sheet, clock = Sheet(out, {**here(args.device), "weights": weights}), Clock(args.minutes)
    works: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        (
            {"what": "memory", "side": side, "estimator": estimator, "batch": batch},
            functools.partial(memory, side, estimator, batch, args),
        )
        for side, estimator in (("vestige", ESTIMATORS[0]), ("vestige", ESTIMATORS[1]), ("authors", ESTIMATORS[1]))
        for batch in (1, args.batch)
    ]
    works += [
        (
            {"what": "seconds", "estimator": estimator, "images": args.images, "patch": patch},
            functools.partial(timed, peer, estimator, patch, args),
        )
        for patch in args.patches
        for estimator in args.estimators
    ]
    for key, work in works:
        if not sheet.has(**key) and not clock.over:
            sheet.add({**key, **work()})


if __name__ == "__main__":
    main()
