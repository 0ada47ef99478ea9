"""Write the table of mixers into layers.md, from the registry and from what each is measured to hold.

Run by hand where a mixer was added or holds something else: ``python docs/scripts/mixers.py``. A test compares.
"""

from __future__ import annotations

from pathlib import Path

from vestige.core.registry import registry
from vestige.layers.footprint import footprint
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.models.blocks import names_of

PAGE = Path(__file__).resolve().parent.parent / "layers.md"
BEGIN, END = "<!-- mixers: begin -->", "<!-- mixers: end -->"
PLACE = Place(hidden_size=64, heads=4, index=1, layers=4)
TOKENS = 260  # more than any window; the further ones are whole blocks, so that memories stand where they stood


def table() -> str:
    """One row per registered mixer, those first that hold least."""
    rows = []
    for name in names_of(Mixer):
        mixer = registry.load(name)()
        held = footprint(mixer, PLACE, TOKENS, further=64)
        growth = f"{held.per_token:,.0f}" if held.per_token else "0"
        rows.append((held.per_token, held.nbytes, f"| `{name}` | {held.nbytes:,} | {growth} | {mixer.forgets} |"))
    head = [f"| mixer | bytes after {TOKENS} tokens | bytes per further token | how it forgets |", "|---|---|---|---|"]
    return "\n".join([*head, *(row for _, _, row in sorted(rows))])


def written(page: str) -> str:
    """The page with the table of now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
