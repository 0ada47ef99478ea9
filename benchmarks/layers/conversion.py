"""What is left of a pretrained model when a mixer takes over from its attention, before and after distillation.

    python benchmarks/layers/conversion.py --out conversion.json --seeds 0 1 2
    python benchmarks/layers/conversion.py --out conversion.json --mixers softmax --layers 2-29
    python benchmarks/layers/conversion.py --out conversion.json --layers 2-4,6-8,10-12,14-16,18-20,22-24,26-28

Looked at are State of the Union addresses that were not trained on: nats per token, and nats per token of a passage's
second reading, which lies further back than the window (``again``): what of the past beyond it can be found again.
``bytes`` are what the whole model holds after a block. The mixer ``softmax`` is the attention that was there: what the
second stage alone teaches it. Stages that a ledger holds for a seed are not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import Clock, Sheet, here

from vestige.evidence.data.text import read_source
from vestige.layers.mixers.attention import AttentionMixer
from vestige.models import load
from vestige.models.blocks import parse_blocks
from vestige.models.convert import Conversion, convert
from vestige.models.distill import distill
from vestige.models.hub import find_device

MIXERS = ("lizard(window=128)", "sliding-window(window=128)", "softmax")


@torch.no_grad()
def looked_at(model: nn.Module, blocks: Tensor, batch: int) -> dict[str, Any]:
    """Loss on blocks of text, and on the second reading of the first half of each; bytes held after one block."""
    model.eval()
    half, found = blocks.shape[1] // 2, {"loss": 0.0, "again": 0.0}
    for some in blocks.split(batch):
        twice = torch.cat([some[:, :half]] * 2, 1)
        for name, rows, first in (("loss", some, 0), ("again", twice, half)):
            logits = model(input_ids=rows, use_cache=False).logits[:, first:-1]
            losses = F.cross_entropy(logits.float().flatten(0, 1), rows[:, first + 1 :].flatten())
            found[name] += float(losses) * len(some) / len(blocks)
    cache = model(input_ids=blocks[:1], use_cache=True).past_key_values
    return {**found, "bytes": Conversion.nbytes(cache)}


def texts(tokenizer: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks to learn from, and the last twentieth to be looked at."""
    ids = tokenizer("\n\n".join(read_source("sotu")), return_tensors="pt", verbose=False).input_ids[0]
    blocks = ids[: len(ids) // length * length].view(-1, length).to(device)
    held_out = len(blocks) // 20
    return blocks[:-held_out], blocks[-held_out:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the order of the text")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", default="2-29")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after so many")
    sizes = {"length": 512, "batch": 8, "match": 300, "tune": 300, "asked": 64}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    clock, device = Clock(given.minutes), find_device("auto")
    model, tokenizer = load(given.model, device=str(device))
    learnt, held_out = texts(tokenizer, given.length, device)
    asked = held_out[: given.asked]
    same = {name: getattr(given, name) for name in ("model", "layers", *sizes)}
    sheet = Sheet(given.out, here(str(device)))
    if not sheet.has(stage="attention", **same):
        sheet.add({"stage": "attention", **same, **looked_at(model, asked, given.batch)})
    for seed in given.seeds:
        for mixer in given.mixers:
            whose = {"mixer": mixer, "seed": seed, **same}
            if sheet.has(stage="tuned", **whose) or clock.over:
                continue
            swap = convert(model, cast("AttentionMixer", parse_blocks(mixer)[0][0].mixer), layers=given.layers)
            begun = time.perf_counter()
            stages = [("converted", 0, 0), ("matched", given.match, 0), ("tuned", 0, given.tune)]
            if not any(part.fresh() for part in swap.modules):
                del stages[1]  # there is nothing that attention did not have
            for stage, match, tune in stages:
                if match or tune:
                    distill(swap, learnt, match_steps=match, tune_steps=tune, batch=given.batch, seed=seed)
                row = {"stage": stage, **whose, **looked_at(model, asked, given.batch)}
                row["seconds"] = time.perf_counter() - begun
                if not sheet.has(stage=stage, **whose):
                    sheet.add(row)
            swap.undo()


if __name__ == "__main__":
    main()
