"""Fit the plans of heads for a model, as those that come with Vestige were fitted, and show what they are worth.

    python benchmarks/context/fit_plans.py                     # into the cache folder, found by name from then on
    python benchmarks/context/fit_plans.py --out src/vestige/context/plan/fitted      # those that come with Vestige
    python benchmarks/context/fit_plans.py --plans moa --density 0.25 0.1 --lengths 256 512 1024 --out ...  # and these

moa's integer programs take longest: some 600 of a second each for five lengths, 25 for three. An interrupted fit of
gates goes on where it was. What is printed at the end are each plan's windows after 1,000 tokens.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from rich.progress import Progress

from vestige.context.plan.duo_attention import DuoAttention
from vestige.context.plan.moa import MoA
from vestige.context.plan.passkeys import pass_keys
from vestige.context.plan.razor_attention import RazorAttention
from vestige.context.plan.windows import HeadWindows
from vestige.core.anatomy import Anatomy
from vestige.models import load

PLANS = ("razor-attention", "moa", "duo-attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="a folder; default: the user's cache folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 384, 512, 768, 1024], help="tokens of texts")
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--words", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=60)
    parser.add_argument("--density", type=float, nargs="+", default=[0.5], help="of moa: a plan for each")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=PLANS)
    parser.add_argument("--texts", type=int, default=8, help="texts of each length that influences are profiled on")
    parser.add_argument("--checkpoint", type=Path, default=Path("duo-attention.training.safetensors"))
    given = parser.parse_args()
    model, tokenizer = load(given.model, dtype="float32", device=given.device)

    windows = {"sinks": given.sinks, "recent": given.recent}
    with Progress() as progress:

        def shown(what: str):
            task = progress.add_task(what, total=None)
            return lambda done, of: progress.update(task, completed=done, total=of)

        plans: list[HeadWindows] = []
        if "razor-attention" in given.plans:
            plans.append(
                RazorAttention.fit(model, tokenizer, texts=4, parameters=windows, progress=shown("razor-attention"))
            )
        if "moa" in given.plans:
            stream = [pass_keys(tokenizer, [n], keys=given.keys, words=given.words) for n in given.lengths]
            texts = [text for each in stream for text in itertools.islice(each, given.texts)]
            for density in given.density:
                near = {"sinks": given.sinks, "recent": 12, "density": density}
                plans.append(MoA.fit(model, samples=texts, parameters=near, progress=shown(f"moa, {density:g}")))
        if "duo-attention" in given.plans:
            stream = pass_keys(tokenizer, given.lengths, keys=given.keys, words=given.words, seed=1)
            duo = DuoAttention.fit(
                model,
                samples=list(itertools.islice(stream, given.steps)),
                steps=given.steps,
                learning_rate=given.learning_rate,
                checkpoint=given.checkpoint,
                parameters=windows,
                progress=shown("duo-attention"),
            )
            plans.append(duo)
    for plan in plans:
        file = f"{plan.fitted_on}{plan.variant}.safetensors"
        place = None if given.out is None else given.out / plan.name / file
        print(plan.name, plan.save(place))
        print(table(plan, Anatomy.of(model)))


def table(plan: HeadWindows, anatomy: Anatomy) -> str:
    """The plan's windows after 1,000 tokens, a line for each layer; a dot for a head that keeps everything."""
    rows = []
    for layer in range(anatomy.num_layers):
        cells = ("." if window is None else str(window) for window in plan.windows(layer, 1000))
        rows.append(f"  layer {layer:3d}  " + "  ".join(f"{cell:>5}" for cell in cells))
    return "\n".join(rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
