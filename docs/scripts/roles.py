"""Docstrings name objects as :class:`Name`, which Markdown does not know: leave the name, set as code."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([^<]+)</code>")
LITERAL_BLOCK = re.compile(r"::(</p>\s*<(?:pre|div))")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with each page after Markdown."""
    html = ROLE.sub(lambda match: f"<code>{match[1]}</code>", html)
    return LITERAL_BLOCK.sub(r":\1", html)
