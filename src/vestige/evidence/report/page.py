"""The shell of every report: one HTML file that needs no network, on a phone, on paper, in light and dark.

A page is sections of blocks: paragraphs, headline answers, tables, figures. Colours are not in the figures but in
the page's style sheet, so that they follow the reader's light or dark setting; a figure's traces say which role they
play (``meta={"series": 2}`` or ``meta={"scale": "share"}``, see :mod:`vestige.evidence.report.figures`).
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vestige.core.files import write_whole

__all__ = [
    "Answers",
    "Code",
    "Figure",
    "Figures",
    "Page",
    "Record",
    "Records",
    "Section",
    "Table",
    "Text",
    "versions_line",
    "write_page",
]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Answers:
    """Headline answers: a large number with a sentence each."""

    answers: Sequence[tuple[str, str]]
    kind: str = "answers"


@dataclass(frozen=True)
class Table:
    """A table: column titles, rows of texts, and what it shows. Columns after the first ``labels`` hold numbers.

    Where ``points`` names one for each row, the row leads to that point's records.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    labels: int = 1
    points: Sequence[str] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Record:
    """A row of :class:`Records`.

    Attributes:
        cells: texts, each with what it sorts by: a number or a text.
        of: names of the points that it is part of; what is named so elsewhere on the page leads here.
        command: that measures it again, where there is one.
        json: the row as it is stored.
    """

    cells: Sequence[tuple[str, float | str]]
    of: Sequence[str] = ()
    command: str = ""
    json: str = ""


@dataclass(frozen=True)
class Records:
    """A long table that the reader sorts and filters; each record opens to its command and to all that it holds.

    Columns after the first ``labels`` hold numbers.
    """

    name: str
    columns: Sequence[str]
    records: Sequence[Record]
    caption: str
    labels: int = 1
    kind: str = "records"


@dataclass(frozen=True)
class Code:
    """A command."""

    code: str
    kind: str = "code"


@dataclass(frozen=True)
class Figure:
    """A plotly figure.

    Attributes:
        name: its anchor on the page.
        figure: a ``plotly.graph_objects.Figure``; its layout's height counts, its width is the page's.
        title: stands above it.
        caption: how to read it.
        says: what it shows, for those who cannot see it.
    """

    name: str
    figure: Any
    title: str
    caption: str
    says: str
    kind: str = "figure"

    @property
    def json(self) -> str:
        """Data and layout, safe to stand in a script element."""
        return str(self.figure.to_json()).replace("</", "<\\/")

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.figure.layout.height or 420)


@dataclass(frozen=True)
class Figures:
    """Small figures side by side, one under the other where the page is narrow."""

    figures: Sequence[Figure]
    kind: str = "figures"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    name: str
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page as one file, whole or not at all.

    Returns:
        The file's path.
    """
    return write_whole(path, render(page))


def render(page: Page) -> str:
    """The page as HTML text, with scripts and styles inside."""
    from plotly.offline import get_plotlyjs

    return _template().render(page=page, style=_asset("page.css"), script=_asset("page.js"), plotly=get_plotlyjs())


def versions_line() -> str:
    """The footer of a page of measurements: what measured them, and where they are."""

    import torch
    import transformers

    import vestige

    return (
        f"Vestige {vestige.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}. Every number here is a row of ledger.jsonl beside this page."
    )


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_asset("page.html.j2"))


@functools.cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
