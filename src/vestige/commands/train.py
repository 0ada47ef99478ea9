"""Train a language model whose blocks a YAML file names, on any text.

The file says what is trained, on what, and how: out, data, model (blocks, hidden_size ...), tokenizer, length, batch,
steps, learning_rate and more. Under torchrun or accelerate the same command uses every device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RESUME = "the same command goes on from the last checkpoint"


def run(
    config: Annotated[Path, typer.Argument(help="The YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the model, instead of the file's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where the folder holds a run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    from accelerate import PartialState

    from vestige.commands._shared import print_json
    from vestige.training.pretrain import read, train

    settings = read(config, steps=steps, seed=seed, out=None if out is None else str(out.resolve()))
    trained = train(settings, fresh=fresh, quiet=quiet)
    if PartialState().is_main_process:
        outcome = {
            "folder": str(trained.folder),
            "steps": trained.steps,
            "loss": trained.loss,
            "bits_per_byte": trained.bits_per_byte,
            "parameters": trained.model.num_parameters(),
            "finished": trained.finished,
        }
        if as_json:
            print_json(outcome)
        else:
            print(
                f"{trained.folder}: {outcome['parameters']:,} parameters, {trained.steps} steps, held-out loss "
                f"{trained.loss:.4f} nats per token, {trained.bits_per_byte:.4f} bits per byte"
            )
    if not trained.finished:
        raise KeyboardInterrupt
