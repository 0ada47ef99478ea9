"""Write the table of mixers into layers.md, from the registry and from what each is measured to hold.

Run by hand where a mixer was added or holds something else: ``python docs/scripts/mixers.py``. A test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, put, table, update

from vestige.core.registry import registry
from vestige.layers.footprint import footprint
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.models.blocks import names_of

PAGES = (ROOT / "docs" / "layers.md",)
PLACE = Place(hidden_size=64, heads=4, index=1, layers=4)
TOKENS = 260  # more than any window; the further ones are whole blocks, so that memories stand where they stood


def mixers() -> list[str]:
    """One row per registered mixer, those first that hold least."""
    rows = []
    for name in names_of(Mixer):
        mixer = registry.load(name)()
        held = footprint(mixer, PLACE, TOKENS, further=64)
        growth = f"{held.per_token:,.0f}" if held.per_token else "0"
        rows.append((held.per_token, held.nbytes, [f"`{name}`", f"{held.nbytes:,}", growth, mixer.forgets]))
    heads = ["mixer", f"bytes after {TOKENS} tokens", "bytes per further token", "how it forgets"]
    return table(heads, [cells for _, _, cells in sorted(rows)])


TABLES = {"mixers": mixers}


def written(page: str) -> str:
    """The page with the table of now."""
    return put(page, "mixers", mixers())


if __name__ == "__main__":
    update(PAGES, written)
