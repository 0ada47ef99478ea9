"""What small models of each mixer recall for the bytes that they hold, and how well larger ones model speeches.

    python benchmarks/layers/quality.py recall --out recall.jsonl --workers 5 --minutes 14
    python benchmarks/layers/quality.py language --out language.jsonl --workers 3 --minutes 14

``recall``: multi-query associative recall (arXiv 2312.04927). A model has two blocks: one that can hold no pairs, the
same for all, whose short convolution tells each value its key (without it a model learns for thousands of steps before
it recalls anything at all), and one of the mixer. Rows with 4, 8, 16 and 32 pairs take turns while it learns;
``accuracy`` is that on rows with the most. ``state_bytes`` are what the second one holds after a row, in float32.

``language``: State of the Union addresses, byte-pair tokens, the last twentieth held out, under bfloat16 autocast on
CUDA; all blocks are of the mixer, or of the pattern that is named.

All models of one size have the same number of parameters (what a mixer takes, the channel mixers give) and see the
same tokens. Every row is added to ``--out`` as it comes; what stands there is not measured again, so a run may be
killed at any moment. ``--part 1/2`` is every other cell: for two devices, each with a file of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from vestige.core.files import write_whole
from vestige.evidence.budgets import label
from vestige.evidence.data.text import read_source
from vestige.evidence.descent import descend
from vestige.evidence.engine.bench import device_name, now
from vestige.evidence.engine.record import Record, cell_key
from vestige.evidence.equal import of_size, parameters_of
from vestige.evidence.tasks.mqar import MQAR
from vestige.models.blocks import parse_blocks
from vestige.models.config import VestigeConfig
from vestige.models.hub import find_device
from vestige.models.lm import VestigeLM
from vestige.training.pretrain import train
from vestige.training.text import make_tokenizer

FRONT = "mamba2(state=1)"  # a gated short convolution; one number per channel is all that it carries further
RECALL = (
    *("softmax", "aaren", "linear-attention", "gla", "hgrn2", "delta-net", "gated-delta-net", "lightning-attention"),
    *("transnormer-llm", "sparse-state-expansion", "mamba2", "mamba2(state=16)", "local-linear-attention"),
    *("sliding-window(window=16)", "sliding-window(window=64)", "lizard(window=16, features=32)"),
    *("based", "based(feature_dim=8)", "based(feature_dim=4)"),
)
LEARNING = (  # memories that learn: many small steps per row, which take several times as long
    *("titans", "titans-mac", "titans-mag(window=16)", "titans-mal(window=16)", "miras", "yaad", "moneta", "memora"),
    *("omega-net", "deep-transformers", "atlas"),
)
LANGUAGE = (
    *("softmax", "gated-delta-net", "gla", "sliding-window(window=64)", "linear-attention", "delta-net", "hgrn2"),
    *("mamba2", "based", "lightning-attention", "gated-delta-net*4 softmax", "sparse-state-expansion"),
)
WIDTHS = (64, 32, 128)
ASKED_APART = 2**32  # the rows of an examination come from seeds above this


def recall_cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured of recall, the most telling first."""
    task = {"length": given.length, "pairs": given.pairs[-1], "keys": given.keys, "values": given.keys}
    same = {
        "task": task,
        "loads": given.pairs,
        "steps": given.steps,
        "rows": given.rows,
        "rate": given.rate,
        "heads": 2,
    }
    rounds = (
        (given.mixers or RECALL, given.widths[:2], given.seeds),
        ([] if given.mixers else LEARNING, given.widths[:1], given.seeds[:1]),
        (given.mixers or RECALL, given.widths[2:], given.seeds),
        ([] if given.mixers else LEARNING, given.widths[:1], given.seeds[1:]),
    )
    for blocks, widths, seeds in rounds:
        for width in widths:
            for seed in seeds:
                for block in blocks:
                    yield {"blocks": block, "width": width, "seed": seed, **same}


def recall(cell: dict[str, Any], keep: str | None) -> dict[str, Any]:
    """Train a model and ask it."""
    task, width, device = MQAR(**cell["task"]), cell["width"], find_device("auto")
    taught = itertools.cycle([task.replace(pairs=pairs) for pairs in cell["loads"]])
    sizes = {
        "hidden_size": width,
        "num_attention_heads": cell["heads"],
        "vocab_size": task.vocabulary,
        "max_position_embeddings": task.length,
        "initializer_range": width**-0.5,
    }
    wanted = parameters_of(VestigeConfig(blocks=[FRONT, "softmax"], intermediate_size=5 * width, **sizes))
    torch.manual_seed(cell["seed"])
    model = VestigeLM(of_size(wanted, blocks=[FRONT, cell["blocks"]], **sizes)).to(device).train()

    def loss(chance: torch.Generator) -> torch.Tensor:
        batch = next(taught).draw(cell["rows"], chance).to(device)
        return task.loss(model(batch.tokens).logits, batch.targets)

    began = now(model.device)
    losses = descend(model, loss, steps=cell["steps"], rate=cell["rate"], seed=cell["seed"])
    seconds = now(model.device) - began
    model.eval()
    asked = {pairs: task.replace(pairs=pairs) for pairs in cell["loads"]}
    right = {pairs: one.score(model, seed=ASKED_APART + cell["seed"], count=256).value for pairs, one in asked.items()}
    row = task.draw(1, torch.Generator().manual_seed(0)).tokens.to(device)
    with torch.no_grad():
        state = model(row, use_cache=True).past_key_values
    tail = losses[-max(1, len(losses) // 20) :]
    found = {
        "accuracy": right[task.pairs],
        "accuracy_by_pairs": right,
        "loss": sum(tail) / len(tail),
        "parameters": model.num_parameters(),
        "state_bytes": state.nbytes_by_layer[-1],
        "held_by_all": state.nbytes,
        "seconds": seconds,
        "chance": task.chance,
        "tokens": cell["steps"] * cell["rows"] * task.length,
    }
    if keep is not None:
        save(model, cell, found, Path(keep) / f"{found_name(cell)}-{width}")
    return found


def found_name(cell: dict[str, Any]) -> str:
    """The mixer of a cell, as a name of a folder."""
    return re.sub(r"[^\w=]+", "-", label(parse_blocks(cell["blocks"])[0][0].mixer)).strip("-")


def save(model: VestigeLM, cell: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    """A trained model with its card."""
    model.cpu().save_pretrained(folder)
    task = json.dumps(MQAR(**cell["task"]).spec())
    card = f"""---
license: apache-2.0
library_name: vestige
tags: [associative-recall]
task: {task}
---

# A small model that recalls pairs

Blocks: `{FRONT}`, then `{cell["blocks"]}`; width {cell["width"]}, {found["parameters"]:,} parameters, float32.

Trained from nothing on drawn rows of the task above, with {cell["loads"]} pairs in turn:
{cell["steps"]:,} steps of {cell["rows"]} rows, AdamW, largest step size {cell["rate"]:g}, seed {cell["seed"]}
(`benchmarks/layers/quality.py recall --keep`).

On 256 rows that it was not trained on it gives {found["accuracy"]:.1%} of the values that are due (chance
{found["chance"]:.1%}). Its second block holds {found["state_bytes"]:,} bytes then. It knows no language, and is of use
for tests and examples of recall only.
"""
    write_whole(folder / "README.md", card)


def language_cells(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured of language, seed by seed."""
    same = {"text": given.text, "vocabulary": given.vocabulary, "width": given.width, "layers": given.layers}
    same |= {"heads": given.width // 64 or 1, "length": given.length, "rows": given.rows, "steps": given.steps}
    for seed in given.seeds:
        for blocks in given.mixers or LANGUAGE:
            yield {"blocks": blocks, "seed": seed, "rate": given.rate, **same}


def language(cell: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train a model on the text in a folder, and look at its loss on what was held out."""
    sizes: dict[str, Any] = {
        "hidden_size": cell["width"],
        "num_hidden_layers": cell["layers"],
        "num_attention_heads": cell["heads"],
        "max_position_embeddings": cell["length"],
    }
    vocabulary: dict[str, Any] = {"vocab_size": len(make_tokenizer(folder, []))}
    plain = VestigeConfig(blocks="softmax", intermediate_size=4 * cell["width"], **sizes, **vocabulary)
    config = of_size(parameters_of(plain), blocks=cell["blocks"], **sizes, **vocabulary)
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        trained = train(
            {
                "out": out,
                "data": [f"{folder}/*.txt"],
                "tokenizer": folder,
                "model": {**sizes, "blocks": cell["blocks"], "intermediate_size": config.intermediate_size},
                "length": cell["length"],
                "batch": cell["rows"],
                "steps": cell["steps"],
                "warmup": max(1, cell["steps"] // 10),
                "learning_rate": cell["rate"],
                "precision": "bfloat16" if torch.cuda.is_available() else "float32",
                "evaluate_every": cell["steps"],
                "save_every": cell["steps"],
                "seed": cell["seed"],
                "trainer": {"save_strategy": "no"},
            },
            quiet=True,
        )
        row = json.loads((Path(out) / "ledger.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    found = {name: row[name] for name in ("parameters", "tokens", "state_bytes")}
    return {**row["metrics"], **found, "seconds": time.perf_counter() - began, "finished": trained.finished}


def prepare(cells: list[dict[str, Any]], folder: str) -> None:
    """Write the text into a folder, and a tokenizer made of it, once for all models."""
    if not cells:
        return
    for number, text in enumerate(read_source(cells[0]["text"])):
        write_whole(Path(folder) / f"{number:04}.txt", text)
    files = sorted(Path(folder).glob("*.txt"))
    make_tokenizer(f"bpe:{cells[0]['vocabulary']}", files).save_pretrained(folder)


def work(job: tuple[str, dict[str, Any], str | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One cell, in a process of its own; what fails is told and no row."""
    kind, cell, folder = job
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    keep = folder if kind == "recall" and cell["seed"] == 0 and cell["width"] <= 32 else None
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
            found = recall(cell, keep) if kind == "recall" else language(cell, str(folder))
        return cell, found
    except Exception as error:
        return cell, {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def named(cell: dict[str, Any]) -> str:
    """The mixer with its parameters, or the pattern."""
    blocks = parse_blocks(cell["blocks"])
    return label(blocks[0][0].mixer) if len(blocks) == 1 else cell["blocks"]


def measure(given: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Measure the cells that the ledger lacks, several at once, until all are there or time is up."""
    end = time.monotonic() + 60 * given.minutes
    record, device = Record(given.out), device_name(find_device("auto"))  # type: ignore[arg-type]
    first, parts = (int(number) for number in given.part.split("/"))
    keys = {id(cell): cell_key(f"quality-{given.what}", device=device, **cell) for cell in cells}
    left = [cell for cell in cells[first::parts] if keys[id(cell)] not in record.known]
    print(f"{len(left)} of {len(cells)} cells on {device}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if given.what == "language":
            prepare(left, scratch)
        folder = scratch if given.what == "language" else given.keep
        with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
            done = pool.imap_unordered(work, [(given.what, cell, folder) for cell in left])
            for number in range(len(left)):
                try:
                    cell, found = done.next(timeout=max(0.0, end - time.monotonic()))
                except multiprocessing.TimeoutError:
                    print(f"time is up after {number} cells", flush=True)
                    return
                score = found.get("error") or {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
                print(number + 1, cell["blocks"], f"width {cell['width']}, seed {cell['seed']}:", score, flush=True)
                if "error" not in found:
                    key = cell_key(f"quality-{given.what}", device=device, **cell)
                    mixers = sorted({block.mixer.name for block, _ in parse_blocks(cell["blocks"])})
                    names = {"mixer": named(cell), "mixers": mixers}
                    record.store(key, study=f"layers-{given.what}", **names, **cell, **found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="what", required=True)
    one, other = ways.add_parser("recall"), ways.add_parser("language")
    for way in (one, other):
        way.add_argument("--out", type=Path, required=True, help="the ledger, a file of JSON lines")
        way.add_argument("--minutes", type=float, default=600.0, help="stop after so many")
        way.add_argument("--workers", type=int, default=1, help="models that are trained at once")
        way.add_argument("--part", default="0/1", help="I/N: every Nth cell from the Ith")
        way.add_argument("--mixers", nargs="+", help="blocks to measure instead of the list of this file")
        way.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sizes: dict[argparse.ArgumentParser, dict[str, int]] = {
        one: {"length": 96, "keys": 64, "steps": 1200, "rows": 64},
        other: {"width": 384, "layers": 5, "length": 512, "vocabulary": 4096, "steps": 600, "rows": 32},
    }
    for way, numbers in sizes.items():
        for name, default in numbers.items():
            way.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    one.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32], help="in a row: taught in turn, all asked")
    one.add_argument("--rate", type=float, default=4e-3, help="largest step size")
    one.add_argument("--keep", help="folder for the smallest trained models of seed 0, with cards")
    other.add_argument("--rate", type=float, default=2e-3, help="largest step size")
    other.add_argument("--text", default="sotu", help="see vestige.evidence.data.text.SOURCES")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    measure(given, list({"recall": recall_cells, "language": language_cells}[given.what](given)))


if __name__ == "__main__":
    main()
