"""What small models of each mixer recall for the bytes that they hold, and how well larger ones model speeches.

    python benchmarks/layers/quality.py recall --out recall.jsonl --workers 5 --minutes 14
    python benchmarks/layers/quality.py language --out language.jsonl --workers 3 --minutes 14

``recall``: multi-query associative recall (arXiv 2312.04927). A model has two blocks: one that can hold no pairs, the
same for all, whose short convolution tells each value its key (without it a model learns for thousands of steps before
it recalls anything at all), and one of the mixer. Rows have 4 pairs at first and by and by up to 64; all loads take
turns from the middle on. ``accuracy`` is that on rows with the most. ``state_bytes`` are what the second block holds
after a row, in float32. Steps are replayed as CUDA graphs, and models of one mixer take turns.

``language``: State of the Union addresses, byte-pair tokens, the last twentieth held out; all blocks are of the mixer,
or of the pattern that is named.

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
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers.utils import logging

from vestige.core.files import write_whole
from vestige.evidence.budgets import label
from vestige.evidence.data.text import read_source
from vestige.evidence.descent import Descent, descend_together
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
    *("titans", "titans-mac(refresh=16)", "titans-mag(window=16)", "titans-mal(window=16)", "miras", "yaad"),
    *("moneta(by_block=true)", "memora(by_block=true)", "omega-net", "deep-transformers", "atlas(by_block=true)"),
)
LANGUAGE = (
    *("softmax", "gated-delta-net", "gla", "sliding-window(window=64)", "linear-attention", "delta-net", "hgrn2"),
    *("mamba2", "based", "lightning-attention", "gated-delta-net*4 softmax", "sparse-state-expansion"),
)
WIDTHS = (64, 32, 128)
ASKED_APART = 2**32  # the rows of an examination come from seeds above this


def recall_groups(given: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What is measured of recall, the most telling first; models of one mixer and width learn together."""
    task = {"length": given.length, "pairs": given.pairs[-1], "keys": given.keys, "values": given.keys}
    same = {"task": task, "loads": given.pairs, "steps": given.steps, "rows": given.rows, "heads": 2}
    tuned, mine = best_rates(given.tuned), own(given)
    for width in given.widths:
        for block in (mixer for mixer in given.mixers or (*RECALL, *LEARNING) if mine(mixer)):
            rates = [tuned[block, width]] if (block, width) in tuned else given.rates
            cells = itertools.product(rates, given.seeds)
            yield [{"blocks": block, "width": width, "seed": seed, "rate": rate, **same} for rate, seed in cells]


def own(given: argparse.Namespace) -> Callable[[str], bool]:
    """Whether blocks belong to this part."""
    first, parts = (int(number) for number in given.part.split("/"))
    listed = list(given.mixers or {"recall": (*RECALL, *LEARNING), "language": LANGUAGE}[given.what])
    return lambda blocks: listed.index(blocks) % parts == first


def best_rates(tuning: Path | None) -> dict[tuple[str, int], float]:
    """The step size with the best mean score in a ledger of other seeds, for blocks and width."""
    scores: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in [] if tuning is None else tuning.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        score = mean(row["accuracy_by_pairs"].values()) if "accuracy" in row else -row["loss"]
        scores[row["blocks"], row["width"]][row["rate"]].append(score)
    return {of: max(rates, key=lambda rate: mean(rates[rate])) for of, rates in scores.items()}


def recall(cells: list[dict[str, Any]], keep: str | None) -> list[dict[str, Any]]:
    """Train models and ask them."""
    device = find_device("auto")
    began = now(device)
    descents = [lesson(cell, device) for cell in cells]
    losses = descend_together(descents)
    seconds = now(device) - began
    found = []
    for cell, one, seen in zip(cells, descents, losses, strict=True):
        tail = seen[-max(1, len(seen) // 20) :]
        told = {"loss": sum(tail) / len(tail), "captured": one.captured, "seconds": seconds, "together": len(cells)}
        found.append({**examined(one.model, cell), **told})
        if keep is not None and cell["seed"] == 0 and cell["width"] <= 32:
            save(one.model, cell, found[-1], Path(keep) / f"{found_name(cell)}-{cell['width']}")
    return found


def lesson(cell: dict[str, Any], device: torch.device) -> Descent:
    """A new model, and how it is trained."""
    task, width, loads = MQAR(**cell["task"]), cell["width"], cell["loads"]
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
    step = itertools.count()

    def draw(chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        number = next(step)
        open_to = min(len(loads), 1 + number * 2 * len(loads) // cell["steps"])  # all of them from the middle on
        batch = task.replace(pairs=loads[number % open_to]).draw(cell["rows"], chance)
        return batch.tokens, batch.targets

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return task.loss(model(tokens).logits, targets)

    return Descent(model, draw, loss, steps=cell["steps"], rate=cell["rate"], seed=cell["seed"])


def examined(model: VestigeLM, cell: dict[str, Any]) -> dict[str, Any]:
    """What a trained model recalls, and from how many bytes."""
    task = MQAR(**cell["task"])
    model.eval()
    asked = {pairs: task.replace(pairs=pairs) for pairs in cell["loads"]}
    right = {pairs: one.score(model, seed=ASKED_APART + cell["seed"], count=256).value for pairs, one in asked.items()}
    row = task.draw(1, torch.Generator().manual_seed(0)).tokens.to(model.device)
    with torch.no_grad():
        state = model(row, use_cache=True).past_key_values
    return {
        "accuracy": right[task.pairs],
        "accuracy_by_pairs": right,
        "parameters": model.num_parameters(),
        "state_bytes": state.nbytes_by_layer[-1],
        "held_by_all": state.nbytes,
        "chance": task.chance,
        "tokens": cell["steps"] * cell["rows"] * task.length,
    }


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


def language_groups(given: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """What is measured of language, seed by seed; each model learns on its own."""
    same = {"text": given.text, "vocabulary": given.vocabulary, "width": given.width, "layers": given.layers}
    same |= {"heads": given.width // 64 or 1, "length": given.length, "rows": given.rows, "steps": given.steps}
    same |= {"precision": given.precision}
    tuned, mine = best_rates(given.tuned), own(given)
    for seed in given.seeds:
        for blocks in (mixer for mixer in given.mixers or LANGUAGE if mine(mixer)):
            rates = [tuned[blocks, given.width]] if (blocks, given.width) in tuned else given.rates
            yield from ([{"blocks": blocks, "seed": seed, "rate": rate, **same}] for rate in rates)


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
                "precision": cell["precision"],
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


def work(job: tuple[str, list[dict[str, Any]], str | None]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Cells that are measured together, in a process of their own; what fails is told and no row."""
    kind, cells, folder = job
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
            found = recall(cells, folder) if kind == "recall" else [language(cell, str(folder)) for cell in cells]
        return list(zip(cells, found, strict=True))
    except Exception as error:
        return [(cell, {"error": f"{type(error).__name__}: {str(error)[:300]}"}) for cell in cells]


def named(cell: dict[str, Any]) -> str:
    """The mixer with its parameters, or the pattern."""
    blocks = parse_blocks(cell["blocks"])
    return label(blocks[0][0].mixer) if len(blocks) == 1 else cell["blocks"]


def measure(given: argparse.Namespace, groups: list[list[dict[str, Any]]]) -> None:
    """Measure the cells that the ledger lacks, several at once, until all are there or time is up."""
    end = time.monotonic() + 60 * given.minutes
    record, device = Record(given.out), device_name(find_device("auto"))  # type: ignore[arg-type]

    def key(cell: dict[str, Any]) -> str:
        return cell_key(f"quality-{given.what}", device=device, **cell)

    left = [missing for group in groups if (missing := [cell for cell in group if key(cell) not in record.known])]
    print(f"{sum(map(len, left))} of {sum(map(len, groups))} cells on {device}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if given.what == "language":
            prepare(list(itertools.chain(*left)), scratch)
        folder = scratch if given.what == "language" else given.keep
        with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
            done = pool.imap_unordered(work, [(given.what, group, folder) for group in left])
            for number in range(len(left)):
                try:
                    seen = done.next(timeout=max(0.0, end - time.monotonic()))
                except multiprocessing.TimeoutError:
                    print(f"time is up after {number} of {len(left)} groups", flush=True)
                    return
                for cell, found in seen:
                    score = found.get("error") or {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
                    where = f"width {cell['width']}, rate {cell['rate']:g}, seed {cell['seed']}:"
                    print(number + 1, cell["blocks"], where, score, flush=True)
                    if "error" not in found:
                        mixers = sorted({block.mixer.name for block, _ in parse_blocks(cell["blocks"])})
                        names = {"mixer": named(cell), "mixers": mixers}
                        record.store(key(cell), study=f"layers-{given.what}", **names, **cell, **found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="what", required=True)
    one, other = ways.add_parser("recall"), ways.add_parser("language")
    for way in (one, other):
        way.add_argument("--out", type=Path, required=True, help="the ledger, a file of JSON lines")
        way.add_argument("--minutes", type=float, default=600.0, help="stop after so many")
        way.add_argument("--workers", type=int, default=1, help="models that are trained at once")
        way.add_argument("--part", default="0/1", help="I/N: every Nth mixer from the Ith")
        way.add_argument("--mixers", nargs="+", help="blocks to measure instead of the list of this file")
        way.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        way.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="largest step sizes")
        way.add_argument("--tuned", type=Path, help="a ledger of other seeds: of each mixer the best of its rates")
    sizes: dict[argparse.ArgumentParser, dict[str, int]] = {
        one: {"length": 192, "keys": 64, "steps": 4000, "rows": 64},
        other: {"width": 384, "layers": 5, "length": 512, "vocabulary": 4096, "steps": 600, "rows": 32},
    }
    for way, numbers in sizes.items():
        for name, default in numbers.items():
            way.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    one.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="in a row, rising")
    one.add_argument("--keep", help="folder for the smallest trained models of seed 0, with cards")
    other.add_argument("--precision", default="float32", help="float32, or bfloat16: what layers work in")
    other.add_argument("--text", default="sotu", help="see vestige.evidence.data.text.SOURCES")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    measure(given, list({"recall": recall_groups, "language": language_groups}[given.what](given)))


if __name__ == "__main__":
    main()
