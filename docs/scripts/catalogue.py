"""Write catalogue.md from the registry: every method by room, with paper, verdict and parameters."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import mkdocs_gen_files

from vestige.core.registry import MethodCard, registry

DOCS = Path(__file__).resolve().parent.parent
FIGURES = DOCS / "figures" / "methods"  # drawn by benchmarks/figures.py
CERTIFICATES = DOCS.parent / "benchmarks" / "certificates"  # written by benchmarks/certificates.py


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def paper(card: MethodCard) -> str:
    if card.paper is None:
        return ""
    title = f"[{card.paper.title}]({card.paper.url})" if card.paper.url else card.paper.title
    where = ", ".join(str(part) for part in (card.paper.venue, card.paper.year) if part)
    code = f"; [the authors' code]({card.paper.code})" if card.paper.code else ""
    implemented = f"; implements {card.paper.equations}" if card.paper.equations else ""
    return f"{title} ({where}){code}{implemented}"


def certificate(card: MethodCard) -> list[str]:
    place = CERTIFICATES / f"{card.name}.json"
    if not place.exists():
        return []
    found = json.loads(place.read_text(encoding="utf-8"))
    state = "holds" if found["holds"] else "does not hold"
    held = sum(check["status"] == "held" for check in found["checks"])
    when, torch = found["date"][:10], found["packages"]["torch"]
    return [f"*Certificate:* {state}; {held} checks, {found['seconds']:.0f} s ({when}, torch {torch})", ""]


def lines(cards: list[MethodCard]) -> list[str]:
    text = [
        "# Catalogue",
        "",
        f"{len(cards)} methods, written from the registry when these pages were built. The same on your machine: "
        "`vestige methods`, and `vestige show NAME` for one. A *verdict* says whether the paper's claim was seen here: "
        "*reproduced*, *not reproduced*, *not checkable here* or *not yet checked*. Figures show what was measured of "
        "a method beside its kind, on one small model: policies on SmolLM2 with 512 tokens "
        "([choosing](choosing.md)), mixers in small models that are trained for the purpose "
        "([compare](compare.md#layers)), learners and erasers on digits and clothes "
        "([weights](weights-results.md)), studies at small scale ([studies](studies.md)); of all others, what the "
        "behaviour checks of their [certificates](contract.md) saw.",
        "",
        "| method | room | year | verdict |",
        "|---|---|---|---|",
    ]
    for card in cards:
        year = card.paper.year if card.paper else ""
        text.append(f"| [`{card.name}`](#{card.name}) | {card.room} | {year} | {card.verdict.status} |")
    for room, group in groupby(cards, key=lambda card: card.room):
        text += ["", f"## {room.capitalize()}"]
        for card in group:
            text += ["", f"### {card.name} {{ #{card.name} }}", "", card.idea, "", f"*Paper:* {paper(card)}", ""]
            seen = f": {card.verdict.seen}" if card.verdict.seen else ""
            text += [f"*Verdict:* {card.verdict.status}{seen}", ""]
            text += certificate(card)
            if (FIGURES / f"{card.name}.svg").exists():
                text += [f"![{card.name}: what was measured](figures/methods/{card.name}.svg){{ width=480 }}", ""]
            parameters = registry.load(card.name).parameters()
            if parameters:
                text += ["| parameter | type | default | allowed | what it is |", "|---|---|---|---|---|"]
            for name, p in parameters.items():
                default = f"`{cell(repr(p['default']))}`" if "default" in p else "required"
                text.append(f"| `{name}` | `{cell(p['type'])}` | {default} | {cell(p['bounds'])} | {cell(p['help'])} |")
    return text


with mkdocs_gen_files.open("catalogue.md", "w") as page:
    print("\n".join(lines(registry.cards())), file=page)
