"""Plain SVG, readable on light and dark pages, for the figures of the documentation."""

from __future__ import annotations

from html import escape

__all__ = ["svg", "text"]

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
