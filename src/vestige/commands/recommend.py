"""Name the method that is best on a task within the memory for the cache, and how sure that is.

Reads ledgers of comparisons; without one it runs a quick comparison first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RESUME = "the same command goes on where it stopped"


def run(
    ledgers: Annotated[list[Path] | None, typer.Argument(help="Ledgers, or folders that hold one.")] = None,
    model: Annotated[str, typer.Option(help="smollm2 (embedded), a Hugging Face id, or a folder.")] = "smollm2",
    memory: Annotated[str | None, typer.Option(help="For the cache of all contexts, as in 4GB.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="In place of memory: a share of the full cache, as in 0.1.")
    ] = None,
    task: Annotated[str, typer.Option(help="What it is to be good at.")] = "needle",
    contexts: Annotated[int, typer.Option(help="Contexts that share the memory.")] = 1,
    length: Annotated[int | None, typer.Option(help="Tokens of a context; default: as measured.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the quick comparison.")] = Path("vestige-compare"),
    device: Annotated[str, typer.Option(help="Of the quick comparison: cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the quick comparison: float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from vestige.commands._shared import print_json
    from vestige.evidence.recommend import recommend

    found = recommend(
        model,
        memory=memory,
        budget=budget,
        task=task,
        contexts=contexts,
        length=length,
        ledgers=ledgers or (),
        out=out,
        device=device,
        dtype=dtype,
    )
    if as_json:
        print_json(found.summary())
    else:
        print(found)
