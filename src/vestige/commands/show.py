"""Show one method: paper, idea, parameters, verdict, source file."""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    name: Annotated[str, typer.Argument(help="A method; `vestige methods` lists them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import inspect
    from dataclasses import asdict

    from vestige.commands._shared import print_json, wrap
    from vestige.core.registry import registry

    card = registry.card(name)
    cls = registry.load(name)
    parameters, source = cls.parameters(), inspect.getsourcefile(cls)
    if as_json:
        print_json({**asdict(card), "parameters": parameters, "source": source})
        return
    paper = cls.paper
    print(f"{card.name} ({card.room})")
    print(wrap(card.idea, 2))
    print(f"\nPaper\n{wrap(', '.join(str(part) for part in (paper.title, paper.venue, paper.year) if part), 2)}")
    for label, value in (("", paper.url), ("code: ", paper.code), ("implements: ", paper.equations)):
        if value:
            print(wrap(label + value, 2))
    print("\nParameters")
    for key, p in parameters.items():
        default = f"= {p['default']!r}" if "default" in p else "(required)"
        print(f"  {key}: {p['type']} {default}" + (f", {p['bounds']}" if p["bounds"] else ""))
        print(wrap(p["help"], 6))
    if not parameters:
        print("  none")
    print(f"\nVerdict: {card.verdict.status}{': ' + card.verdict.seen if card.verdict.seen else ''}")
    print(f"Source: {source}")
