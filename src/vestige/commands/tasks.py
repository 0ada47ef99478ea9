"""List the tasks: name, what a value is, idea. With a name: its parameters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer


def run(
    name: Annotated[str | None, typer.Argument(help="One task; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from vestige.commands._shared import columns, print_json, wrap
    from vestige.evidence.tasks.registry import registry, tasks

    if name is None:
        cards = tasks()
        if as_json:
            print_json([asdict(card) for card in cards])
        else:
            print(columns((card.name, card.metric, card.idea) for card in cards))
        return
    cls, card = registry.load(name), registry.card(name)
    parameters = cls.parameters()
    if as_json:
        print_json({**asdict(card), "parameters": parameters})
        return
    better = "higher" if card.higher_is_better else "lower"
    print(f"{card.name}, version {card.version}: {card.metric}, {better} is better")
    print(wrap(card.idea, 2))
    rows = [(key, entry["type"], repr(entry.get("default")), entry["help"]) for key, entry in parameters.items()]
    print(columns(rows))
