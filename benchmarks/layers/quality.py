"""What small models of each mixer recall for the bytes that they hold, and how well larger ones model speeches.

    python benchmarks/layers/quality.py recall --out tuning.jsonl --seeds 100 --rates 2e-3 5e-3 --widths 64
    python benchmarks/layers/quality.py recall --out recall.jsonl --tuned tuning.jsonl --workers 2 --minutes 9
    python benchmarks/layers/quality.py language --out language.jsonl --workers 2 --minutes 9

``recall``: multi-query associative recall (arXiv 2312.04927). A model has two blocks: one that can hold no pairs, the
same for all, whose short convolution tells each value its key (without it a model learns for thousands of steps before
it recalls anything at all), and one of the mixer; or the two of a pattern behind the first. Rows have four tokens for
each pair, and a step has as many rows as make ``--tokens``. For a quarter of the steps they have 4 pairs of 16 keys,
then by and by up to 64 of 64 keys; all loads take turns from the middle on. ``accuracy`` is that on rows with the most
pairs, ``state_bytes`` what all blocks but the first hold after one of them, in float32.

``language``: State of the Union addresses, byte-pair tokens, the last twentieth held out and read in pieces; all blocks
are of the mixer, or of the pattern that is named. They learn in bfloat16 on weights in float32 (``--precision``), so
that kernels serve; what is held out is read, and bytes are counted, in float32, on CUDA with TF32 products.

All models of one size have the same number of parameters (what a mixer takes, the channel mixers give) and see the
same tokens. ``--together`` of them take turns in each process; on CUDA steps are captured as graphs. Rows are added to
``--out`` as they come; what stands there is not measured again, so a run may be killed at any moment. With ``--parts``
models that are not done after ``--minutes`` go on in the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from vestige.core.files import drafted, write_whole
from vestige.evidence.budgets import label
from vestige.evidence.data.text import read_source
from vestige.evidence.descent import Descent
from vestige.evidence.engine.bench import device_name
from vestige.evidence.engine.record import Record, cell_key
from vestige.evidence.equal import of_size, parameters_of
from vestige.evidence.tasks.mqar import MQAR
from vestige.models.blocks import parse_blocks
from vestige.models.config import VestigeConfig
from vestige.models.hub import find_device
from vestige.models.lm import VestigeLM
from vestige.training.text import make_tokenizer

FRONT = "mamba2(state=1)"  # a gated short convolution; one number per channel is all that it carries further
RECALL = (
    *("softmax", "aaren", "linear-attention", "gla", "hgrn2", "delta-net", "gated-delta-net", "lightning-attention"),
    *(
        "transnormer-llm",
        "sparse-state-expansion",
        "mamba2",
        "mamba2(state=16)",
        "local-linear-attention(iterations=16)",
    ),
    *("sliding-window(window=16)", "sliding-window(window=64)", "lizard(window=16, features=32)"),
    *("based", "based(feature_dim=8)", "based(feature_dim=4)"),
    *("based(feature_dim=4) sliding-window(window=16)", "based(feature_dim=8) sliding-window(window=16)"),
    *("based(feature_dim=4) sliding-window(window=64)", "based(feature_dim=8) sliding-window(window=64)"),
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
ROOM = 4  # tokens of a row for each of its pairs
PATIENCE = 60  # seconds after the end until a process that does not stop is stopped
TOKENS, COUNTS = "tokens.safetensors", "counts.json"
ASKED_APART = 2**32  # the rows of an examination come from seeds above this


def cells_of(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured, the most telling first."""
    if given.what == "recall":
        same = {"keys": given.keys, "loads": given.pairs, "tokens": given.tokens, "steps": given.steps, "heads": 2}
        mixers: tuple[str, ...] = (*RECALL, *LEARNING)
        widths = given.widths
    else:
        same = {name: getattr(given, name) for name in ("text", "vocabulary", "layers", "length", "rows", "steps")}
        same |= {"precision": given.precision}
        mixers, widths = LANGUAGE, [given.width]
    tuned = best_rates(given.tuned)
    for width, blocks in itertools.product(widths, given.mixers or mixers):
        for rate, seed in itertools.product([tuned[blocks]] if blocks in tuned else given.rates, given.seeds):
            yield {"blocks": blocks, "width": width, "seed": seed, "rate": rate, **same}


def best_rates(tuning: Path | None) -> dict[str, float]:
    """The step size with the best mean score in a ledger of other seeds, for blocks."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    there = tuning is not None and tuning.is_file()
    for line in tuning.read_text(encoding="utf-8").splitlines() if tuning is not None and there else []:
        row = json.loads(line)
        score = mean(row["accuracy_by_pairs"].values()) if "accuracy" in row else -row["loss"]
        scores[row["blocks"]][row["rate"]].append(score)
    return {blocks: max(rates, key=lambda rate: mean(rates[rate])) for blocks, rates in scores.items()}


def task_of(cell: dict[str, Any], pairs: int) -> MQAR:
    """Rows with so many pairs."""
    return MQAR(length=ROOM * pairs, pairs=pairs, keys=cell["keys"], values=cell["keys"])


def recall_lesson(cell: dict[str, Any], device: torch.device) -> Descent:
    """A new model, and how it is trained."""
    width, loads = cell["width"], cell["loads"]
    tasks = [task_of(cell, pairs) for pairs in loads]
    sizes = {
        "hidden_size": width,
        "num_attention_heads": cell["heads"],
        "vocab_size": tasks[-1].vocabulary,
        "max_position_embeddings": tasks[-1].length,
        "initializer_range": width**-0.5,
    }
    wanted = parameters_of(VestigeConfig(blocks=[FRONT, "softmax"], intermediate_size=5 * width, **sizes))
    torch.manual_seed(cell["seed"])
    model = VestigeLM(of_size(wanted, blocks=f"{FRONT} {cell['blocks']}", **sizes)).to(device).train()

    def draw(chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        number = lesson.done
        opened = opened_at(number / cell["steps"], len(loads))
        task = tasks[number % opened]
        some = min(cell["keys"], ROOM * loads[opened - 1])  # few keys at first: their mechanism is found sooner
        batch = task.replace(keys=some, values=some).draw(max(1, cell["tokens"] // task.length), chance)
        more = (batch.tokens > some) * (cell["keys"] - some)  # values stand behind all keys
        return batch.tokens + more, batch.targets + (batch.targets > some) * (cell["keys"] - some)

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return tasks[0].loss(model(tokens).logits, targets)

    lesson = Descent(model, draw, loss, steps=cell["steps"], rate=cell["rate"], seed=cell["seed"])
    return lesson


def opened_at(share: float, loads: int) -> int:
    """How many of the loads are taught after a share of the steps: one, the others by and by, all from the middle."""
    return min(loads, 1 if share < 0.25 else 2 + int((4 * share - 1) * (loads - 1)))


def recalled(model: VestigeLM, cell: dict[str, Any]) -> dict[str, Any]:
    """What a trained model recalls, and from how many bytes."""
    tasks = {pairs: task_of(cell, pairs) for pairs in cell["loads"]}
    asked = {"seed": ASKED_APART + cell["seed"], "count": 256}
    right = {pairs: task.score(model, **asked).value for pairs, task in tasks.items()}
    most = tasks[cell["loads"][-1]]
    row = most.draw(1, torch.Generator().manual_seed(0)).tokens.to(model.device)
    with torch.no_grad():
        state = model(row, use_cache=True).past_key_values
    return {
        "accuracy": right[most.pairs],
        "accuracy_by_pairs": right,
        "parameters": model.num_parameters(),
        "state_bytes": sum(state.nbytes_by_layer[1:]),
        "held_by_all": state.nbytes,
        "chance": most.chance,
    }


def found_name(cell: dict[str, Any]) -> str:
    """The mixer of a cell, as a name of a folder."""
    return re.sub(r"[^\w=]+", "-", named(cell)).strip("-")


def save(model: VestigeLM, cell: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    """A trained model with its card."""
    model.cpu().save_pretrained(folder)
    task = json.dumps(task_of(cell, cell["loads"][-1]).spec())
    card = f"""---
license: apache-2.0
library_name: vestige
tags: [associative-recall]
task: {task}
---

# A small model that recalls pairs

Blocks: `{FRONT}`, then `{cell["blocks"]}`; width {cell["width"]}, {found["parameters"]:,} parameters, float32.

Trained from nothing on drawn rows of such tasks, with {cell["loads"]} pairs and {ROOM} tokens for each:
{cell["steps"]:,} steps of {cell["tokens"]} tokens, AdamW, largest step size {cell["rate"]:g}, seed {cell["seed"]}
(`benchmarks/layers/quality.py recall --keep`).

On 256 rows that it was not trained on it gives {found["accuracy"]:.1%} of the values that are due (chance
{found["chance"]:.1%}). Its second block holds {found["state_bytes"]:,} bytes then. It knows no language, and is of use
for tests and examples of recall only.
"""
    write_whole(folder / "README.md", card)


def language_lesson(cell: dict[str, Any], device: torch.device, folder: Path) -> Descent:
    """A new model, and how it is trained on the tokens in a folder."""
    sizes: dict[str, Any] = {
        "hidden_size": cell["width"],
        "num_hidden_layers": cell["layers"],
        "num_attention_heads": cell["width"] // 64 or 1,
        "max_position_embeddings": cell["length"],
        "vocab_size": json.loads((folder / COUNTS).read_text())["vocabulary"],
    }
    plain = VestigeConfig(blocks="softmax", intermediate_size=4 * cell["width"], **sizes)
    torch.manual_seed(cell["seed"])
    model = VestigeLM(of_size(parameters_of(plain), blocks=cell["blocks"], **sizes)).to(device).train()
    ids, places = load_file(folder / TOKENS)["learnt"].to(device), torch.arange(cell["length"] + 1, device=device)

    def draw(chance: torch.Generator) -> tuple[torch.Tensor]:
        starts = torch.randint(len(ids) - cell["length"], (cell["rows"], 1), generator=chance, device=device)
        return (ids[starts + places],)

    def loss(block: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cell["precision"] == "bfloat16"):
            logits = model(block[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())

    return Descent(model, draw, loss, steps=cell["steps"], rate=cell["rate"], seed=cell["seed"])


@torch.no_grad()
def predicted(model: VestigeLM, cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The loss of a trained model on what was held out."""
    ids, counts = load_file(folder / TOKENS)["held_out"], json.loads((folder / COUNTS).read_text())
    pieces = ids[: (len(ids) - 1) // cell["length"] * cell["length"] + 1].unfold(0, cell["length"] + 1, cell["length"])
    losses = [
        F.cross_entropy(model(some[:, :-1]).logits.mT, some[:, 1:], reduction="none").double().sum()
        for some in pieces.to(model.device).split(cell["rows"])
    ]
    loss = float(sum(losses)) / pieces[:, 1:].numel()
    return {
        "loss": loss,
        "bits_per_byte": loss / math.log(2) * len(ids) / counts["held_out_bytes"],
        "parameters": model.num_parameters(),
        "state_bytes": model(pieces[:1, :-1].to(model.device), use_cache=True).past_key_values.nbytes,
    }


def prepare(text: str, vocabulary: int, folder: Path) -> None:
    """Write the tokens of a text into a folder, once for all models."""
    whole = "\n\n".join(read_source(text))
    cut = len(whole) - len(whole) // 20
    parts = {"learnt": whole[:cut], "held_out": whole[cut:]}
    write_whole(folder / "text.txt", parts["learnt"])
    tokenizer = make_tokenizer(f"bpe:{vocabulary}", [folder / "text.txt"])
    save_file({name: torch.tensor(tokenizer(part).input_ids) for name, part in parts.items()}, folder / TOKENS)
    counts = {"vocabulary": len(tokenizer), "held_out_bytes": len(parts["held_out"].encode())}
    write_whole(folder / COUNTS, json.dumps(counts))


class Job(NamedTuple):
    """Models that take turns in a process of their own.

    Attributes:
        kind: what they learn.
        cells: the models.
        folder: the text, or where trained models are kept.
        parts: where those are left that are not done in time.
        end: then they stop, in seconds of :func:`time.time`.
    """

    kind: str
    cells: list[dict[str, Any]]
    folder: str | None
    parts: Path | None
    end: float

    def part(self, cell: dict[str, Any]) -> Path | None:
        """The file of a model that is not done."""
        return self.parts and self.parts / f"{cell_key(self.kind, **cell)}.safetensors"


def work(job: Job) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What is found of those that are done in time; what fails is told and no row."""
    if time.time() > job.end:
        return []
    kind, cells, folder = job.kind, job.cells, job.folder
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if kind == "language":
        torch.set_float32_matmul_precision("high")
    device, descents = find_device("auto"), {}
    found: dict[int, dict[str, Any]] = {}
    for number, cell in enumerate(cells):
        with told(found, number):
            descents[number] = (
                recall_lesson(cell, device)
                if kind == "recall"
                else language_lesson(cell, device, Path(cast("str", folder)))
            )
            if (part := job.part(cell)) and part.is_file():
                descents[number].go_on(load_file(part))
    while left := [n for n, one in descents.items() if n not in found and one.done < one.steps]:
        if time.time() > job.end:
            for number in left:
                if part := job.part(cells[number]):
                    with drafted(part) as draft:
                        save_file(descents[number].tensors(), draft)
            break
        for number in left:
            with told(found, number):
                descents[number].step()
    for number in [n for n, one in descents.items() if n not in found and one.done == one.steps]:
        with told(found, number):
            found[number] = looked_at(kind, cells[number], descents[number], folder)
    return [(cells[number], one) for number, one in sorted(found.items())]


@contextlib.contextmanager
def told(found: dict[int, dict[str, Any]], number: int) -> Iterator[None]:
    """What fails is what was found of a model; the others go on."""
    try:
        yield
    except Exception as error:
        found[number] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def looked_at(kind: str, cell: dict[str, Any], descent: Descent, folder: str | None) -> dict[str, Any]:
    """What a model has learnt."""
    losses, model = descent.losses(), cast("VestigeLM", descent.model.eval())
    tail = losses[-max(1, len(losses) // 20) :]
    found = {"loss_learnt": mean(tail), "captured": descent.captured}
    if kind == "language":
        return {**predicted(model, cell, Path(cast("str", folder))), **found}
    found = {**recalled(model, cell), **found}
    if folder is not None and cell["seed"] == 0 and cell["width"] <= 32:
        save(model, cell, found, Path(folder) / f"{found_name(cell)}-{cell['width']}")
    return found


def named(cell: dict[str, Any]) -> str:
    """The mixer with its parameters, or the pattern."""
    blocks = parse_blocks(cell["blocks"])
    return label(blocks[0][0].mixer) if len(blocks) == 1 else cell["blocks"]


def measure(given: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Measure the cells that the ledger lacks, several at once, until all are there or time is up."""
    end = time.time() + 60 * given.minutes
    record, device = Record(given.out), device_name(find_device("auto"))  # type: ignore[arg-type]

    def key(cell: dict[str, Any]) -> str:
        return cell_key(f"quality-{given.what}", device=device, **cell)

    left = [cell for cell in cells if key(cell) not in record.known]
    groups = [left[first : first + given.together] for first in range(0, len(left), given.together)]
    print(f"{len(left)} of {len(cells)} cells on {device}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if given.what == "language" and left:
            prepare(given.text, given.vocabulary, Path(scratch))
        folder = scratch if given.what == "language" else given.keep
        with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
            jobs = [Job(given.what, group, folder, given.parts, end) for group in groups]
            done = pool.imap_unordered(work, jobs)
            for number in range(len(jobs)):
                try:
                    seen = done.next(timeout=max(0.0, end + PATIENCE - time.time()))
                except multiprocessing.TimeoutError:
                    break  # a process that died, or cannot stop
                for cell, found in seen:
                    score = found.get("error") or {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
                    where = f"width {cell['width']}, rate {cell['rate']:g}, seed {cell['seed']}:"
                    print(number + 1, cell["blocks"], where, score, flush=True)
                    if "error" not in found:
                        mixers = sorted({block.mixer.name for block, _ in parse_blocks(cell["blocks"])})
                        names = {"mixer": named(cell), "mixers": mixers}
                        record.store(key(cell), study=f"layers-{given.what}", **names, **cell, **found)
                        if part := jobs[0].part(cell):
                            part.unlink(missing_ok=True)
    print(f"{sum(key(cell) not in record.known for cell in cells)} cells are left", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="what", required=True)
    one, other = ways.add_parser("recall"), ways.add_parser("language")
    for way in (one, other):
        way.add_argument("--out", type=Path, required=True, help="the ledger, a file of JSON lines")
        way.add_argument("--minutes", type=float, default=600.0, help="stop after so many")
        way.add_argument("--parts", type=Path, help="folder in which models are left that are not done by then")
        way.add_argument("--workers", type=int, default=1, help="processes")
        way.add_argument("--together", type=int, default=1, help="models that take turns in each of them")
        way.add_argument("--mixers", nargs="+", help="blocks to measure instead of the list of this file")
        way.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        way.add_argument("--tuned", type=Path, help="a ledger of other seeds: of each mixer the best of its rates")
    sizes: dict[argparse.ArgumentParser, dict[str, int]] = {
        one: {"keys": 64, "steps": 4000, "tokens": 8192},
        other: {"width": 384, "layers": 5, "length": 512, "vocabulary": 4096, "steps": 400, "rows": 32},
    }
    for way, numbers in sizes.items():
        for name, default in numbers.items():
            way.add_argument(f"--{name}", type=int, default=default)
    for way, rate in ((one, 3e-3), (other, 1e-3)):
        way.add_argument("--rates", type=float, nargs="+", default=[rate], help="largest step sizes")
    one.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    one.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="in a row, rising")
    one.add_argument("--keep", help="folder for the smallest trained models of seed 0, with cards")
    other.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of products")
    other.add_argument("--text", default="sotu", help="see vestige.evidence.data.text.SOURCES")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    measure(given, list(cells_of(given)))


if __name__ == "__main__":
    main()
