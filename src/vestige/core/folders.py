"""Where Vestige keeps what it has made once and will want again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$VESTIGE_CACHE``, else ``$XDG_CACHE_HOME/vestige``, else ``~/.cache/vestige``. It need not exist yet.

    Deleting it costs time, never results.
    """
    if own := os.environ.get("VESTIGE_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG rules say that a relative path is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "vestige"
