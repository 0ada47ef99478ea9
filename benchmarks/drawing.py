"""Plain SVG, readable on light and dark pages, for the figures of the documentation."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["OUT", "rows_of", "svg", "text", "write"]

OUT = Path(__file__).parents[1] / "docs" / "figures"

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2937 }
  .small { font-size: 11.5px } .title { font-weight: 600 }
  .axis { stroke: #6b7280; stroke-width: 1 } .grid { stroke: #9ca3af; stroke-opacity: .3 }
  .grey { stroke: #9ca3af; fill: none } .greydot { fill: #9ca3af } .bar { fill: #0f766e } .peer { fill: #9ca3af }
  .floor { stroke: #dc2626; stroke-width: 2 }
  .mark { stroke: #1f2937; stroke-width: 2.5 } .hollow { fill: none; stroke: #6b7280; stroke-width: 1.5 }
  .cell { fill: #0f766e } .later { fill: #9ca3af; fill-opacity: .15 } .faint { fill-opacity: .55 }
  @media (prefers-color-scheme: dark) { text { fill: #e5e7eb } .axis { stroke: #9ca3af } .mark { stroke: #e5e7eb } }
"""


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, cls: str = "", anchor: str = "start", fill: str = "") -> str:
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a result, one document, or of a ledger, one a line; none where it was not run."""
    if not path.is_file():
        return []
    held = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in held.splitlines()] if path.suffix == ".jsonl" else json.loads(held)["rows"]


def write(figures: dict[str, str], out: Path = OUT) -> None:
    """Figures into files, by their names."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (out / name).write_text(figure, encoding="utf-8")
    print(f"{len(figures)} figures in {out}")
