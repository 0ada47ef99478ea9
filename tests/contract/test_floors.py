"""The house keeps its floors: a room imports the rooms below it, never one beside it or above it.

Layers, models and training stand on core in this order; context, stores and weights stand on them side by side.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vestige

ROOT = Path(vestige.__file__).parent

# Rooms by floor, the lowest first. Modules that stand in the root count as rooms.
FLOORS = [
    {"errors"},
    {"core"},
    {"layers"},
    {"models"},  # made of layers
    {"training"},
    {"context", "stores", "weights"},
    {"evidence"},
    {"cli", "commands", "__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FACADE = "__init__"  # the package's face hands out names of every room, lazily


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imported_rooms(text: str, package: str) -> set[str]:
    """Rooms that a source text imports anywhere, inside functions and for type checking too.

    ``package`` is the dotted name that relative imports start from.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith("import_module") and isinstance(node.args[0].value, str):
                modules.add(node.args[0].value)
    found = {module.split(".")[1] for module in modules if module.startswith("vestige.")}
    doors = {name: place.split(".")[1] for name, place in vestige._DOORS.items()}
    return {doors.get(name, name) for name in found} - {"__version__"}


def forbidden(room: str, imported: set[str]) -> set[str]:
    """Of the rooms imported, those that do not lie below."""
    return {other for other in imported if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]}


FILES = sorted(path for path in ROOT.rglob("*.py") if room_of(path) != FACADE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    room = room_of(path)
    assert room in FLOOR, f"{room} is no room of the house; give it a floor or move it into a room"
    package = ".".join(("vestige", *path.relative_to(ROOT).parts[:-1]))
    wrong = forbidden(room, imported_rooms(path.read_text(encoding="utf-8"), package))
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}, which do not lie below {room}"


@pytest.mark.parametrize(
    ("room", "text", "wrong"),
    [
        ("core", "import vestige.models.hub", {"models"}),
        ("layers", "from vestige.training import schedule", {"training"}),
        ("layers", "from vestige.models.hub import load", {"models"}),
        ("models", "from vestige.layers import ops", set()),
        ("context", "def f():\n    from vestige.evidence.audit import audit", {"evidence"}),
        ("context", "from ..stores import write", {"stores"}),
        ("weights", "import importlib\nimportlib.import_module('vestige.context.cache')", {"context"}),
        ("models", "from vestige import audit", {"evidence"}),
        ("models", "from vestige import stores", {"stores"}),
        ("evidence", "from vestige.cli import app", {"cli"}),
        ("layers", "import vestige.attic", {"attic"}),
        ("context", "from vestige import Method, __version__\nfrom vestige.core.patch import Patch", set()),
        ("context", "from vestige.layers.ops import mass\nfrom .cache import KeptCache\nimport torch", set()),
        ("errors", "import os", set()),
    ],
)
def test_a_wrong_import_is_seen(room, text, wrong):
    assert forbidden(room, imported_rooms(text, f"vestige.{room}")) == wrong


def test_importing_the_package_is_light():
    """Neither torch nor transformers is imported before it is needed."""
    import subprocess
    import sys

    code = "import sys, vestige; vestige.methods(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
