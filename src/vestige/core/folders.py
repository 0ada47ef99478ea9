"""Where Vestige keeps what it has made once and will want again, and where packages of data may lie."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "node_folders"]


def cache_folder() -> Path:
    """``$VESTIGE_CACHE``, else ``$XDG_CACHE_HOME/vestige``, else ``~/.cache/vestige``. It need not exist yet.

    Deleting it costs time, never results.
    """
    if own := os.environ.get("VESTIGE_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG rules say that a relative path is to be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "vestige"


def node_folders() -> list[Path]:
    """Where packages of npm may be installed, the cache folder first."""
    here = Path.cwd()
    own = [folder / "node_modules" for folder in (cache_folder(), here, *here.parents)]
    named = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
    return [*own, *named, Path("/usr/lib/node_modules"), Path("/usr/local/lib/node_modules")]
