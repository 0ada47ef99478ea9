"""List the methods: name, year of the paper, verdict, idea."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer


def run(
    room: Annotated[str | None, typer.Option(help="Only this room: context, layers, models, stores, weights …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from vestige.commands._shared import columns, print_json
    from vestige.core.registry import registry

    cards = registry.cards(room)
    if as_json:
        print_json([asdict(card) for card in cards])
        return
    for place, group in groupby(cards, key=lambda card: card.room):
        print(place)
        print(columns((c.name, str(c.paper.year) if c.paper else "", c.verdict.status, c.idea) for c in group))
    if not cards:
        print(f"no methods in {room}" if room else "no methods")
