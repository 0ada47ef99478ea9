"""Which methods exist, found without importing them.

A method registers by being defined (:meth:`Method.__init_subclass__` calls :meth:`Registry.add`).
To list methods, or to find the module that defines one, nothing is imported: the files of the
package are read, and the head of each method class (docstring, ``name``, ``paper``, ``verdict``)
is parsed. That keeps ``vestige methods`` fast, and means that a new file needs no entry anywhere.

Third parties add methods through the entry point group ``vestige.methods``; an entry's name is the
method's name, its value the class (or the module that defines it).
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.method import Method, Paper, Verdict, did_you_mean
from vestige.errors import SpecError, VestigeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["MethodCard", "method", "methods", "registry"]

ENTRY_POINTS = "vestige.methods"
ROOMS = ("context", "layers", "models", "stores", "weights", "training", "evidence")


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What is known of a method without importing it."""

    name: str
    room: str
    module: str
    qualname: str
    idea: str
    paper: Paper | None
    verdict: Verdict


class Registry:
    """Names to method classes, loaded when asked for."""

    def __init__(self) -> None:
        self._defined: dict[str, type[Method]] = {}

    def add(self, cls: type[Method]) -> None:
        """Register a class that has just been defined.

        Raises:
            SpecError: the name is taken by a class of another place, or the class lacks its paper.
        """
        taken = self._defined.get(cls.name)
        place = (cls.__module__, cls.__qualname__)
        if taken is not None and (taken.__module__, taken.__qualname__) != place:
            raise SpecError(
                f"method name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} must choose another"
            )
        if not isinstance(getattr(cls, "paper", None), Paper):
            raise SpecError(f"{cls.__module__}.{cls.__qualname__} registers as {cls.name!r} but names no paper")
        self._defined[cls.name] = cls

    def cards(self, room: str | None = None) -> list[MethodCard]:
        """All known methods, by room and name; only one room's if named.

        Raises:
            SpecError: there is no such room.
        """
        if room is not None and room not in ROOMS:
            raise SpecError(f"unknown room {room!r}; {did_you_mean(room, ROOMS)}")
        found = {card.name: card for card in _package_cards()}
        for entry in _entries():
            found.setdefault(entry.name, _entry_card(entry))
        for cls in self._defined.values():
            found.setdefault(cls.name, _class_card(cls))
        chosen = [card for card in found.values() if room in (None, card.room)]
        return sorted(chosen, key=lambda card: (card.room, card.name))

    def card(self, name: str) -> MethodCard:
        """One method's card.

        Raises:
            SpecError: unknown name, with the nearest known ones.
        """
        cards = {card.name: card for card in self.cards()}
        if not isinstance(name, str) or name not in cards:
            raise SpecError(f"unknown method {name!r}; {did_you_mean(str(name), cards)}")
        return cards[name]

    def load(self, name: str) -> type[Method]:
        """The class registered under a name, importing its module if need be.

        Raises:
            SpecError: unknown name, with the nearest known ones; or its module does not load.
        """
        if isinstance(name, str) and name in self._defined:
            return self._defined[name]
        card = self.card(name)
        try:
            importlib.import_module(card.module)
        except VestigeError:
            raise
        except Exception as error:
            raise SpecError(f"method {name!r} does not load, {card.module} fails: {error}") from error
        if name not in self._defined:
            raise SpecError(f"{card.module} was imported but does not define the method {name!r}")
        return self._defined[name]


registry = Registry()


def methods(room: str | None = None) -> list[MethodCard]:
    """The cards of all methods, or of one room's. Nothing heavy is imported."""
    return registry.cards(room)


def method(name: str, **parameters: Any) -> Method:
    """Build a method by name: ``vestige.method("a2sf", budget=256)``.

    Raises:
        SpecError: unknown name (with the nearest names), unknown parameter, wrong type, value out of range.
    """
    return registry.load(name)(**parameters)


_CLASS_LINE = re.compile(r"^class (\w+)\([^)]*\):\n", re.MULTILINE)
_HEAD_ENDS = re.compile(r"^(?:    (?:def|async def|@)|[^\s#)])", re.MULTILINE)
_HAS_NAME = re.compile(r"^    name(?:: ClassVar\[str\])? = ", re.MULTILINE)


@functools.cache
def _package_cards() -> tuple[MethodCard, ...]:
    root = Path(__file__).resolve().parent.parent
    files = [(room, path) for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    return tuple(card for room, path in files for card in _file_cards(path, root, room))


def _file_cards(path: Path, root: Path, room: str) -> Iterable[MethodCard]:
    text = path.read_text(encoding="utf-8")
    if "\n    name" not in text:
        return
    folders, own = path.parts[len(root.parts) : -1], () if path.stem == "__init__" else (path.stem,)
    module = ".".join(("vestige", *folders, *own))
    for match in _CLASS_LINE.finditer(text):
        end = _HEAD_ENDS.search(text, match.end())
        body = text[match.end() : end.start() if end else len(text)]
        if not _HAS_NAME.search(body):
            continue
        head = ast.parse(f"class {match[1]}:\n{body}").body[0]
        assert isinstance(head, ast.ClassDef)
        values = dict(_assignments(head.body))
        name = _literal(values.get("name"), text)
        if isinstance(name, str):
            yield MethodCard(
                name=name,
                room=room,
                module=module,
                qualname=match[1],
                idea=_idea(ast.get_docstring(head)),
                paper=_literal(values.get("paper"), text),
                verdict=_literal(values.get("verdict"), text) or Verdict(),
            )


def _assignments(body: list[ast.stmt]) -> Iterable[tuple[str, ast.expr]]:
    for statement in body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value


def _literal(node: ast.expr | None, text: str) -> Any:
    """The value of a literal, of ``Paper(...)`` or ``Verdict(...)`` of literals, or of a module-level name for one."""
    if node is None:
        return None
    if isinstance(node, ast.Name):
        return _literal(dict(_assignments(ast.parse(text).body)).get(node.id), text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = {"Paper": Paper, "Verdict": Verdict}.get(node.func.id)
        if kind is None:
            return None
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
        return kind(*(ast.literal_eval(a) for a in node.args), **keywords)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _idea(doc: str | None) -> str:
    """The first paragraph of a docstring, on one line, without the roles that documentation tools read."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join((doc or "").split("\n\n")[0].split()))


def _class_card(cls: type[Method]) -> MethodCard:
    parts = cls.__module__.split(".")
    room = parts[1] if parts[0] == "vestige" and len(parts) > 1 else getattr(cls, "room", parts[0])
    return MethodCard(
        name=cls.name,
        room=room,
        module=cls.__module__,
        qualname=cls.__qualname__,
        idea=_idea(cls.__doc__),
        paper=cls.paper,
        verdict=cls.verdict,
    )


@functools.cache
def _entries() -> tuple[EntryPoint, ...]:
    return tuple(metadata.entry_points(group=ENTRY_POINTS))


def _entry_card(entry: EntryPoint) -> MethodCard:
    """A third party's card: read from the class if it imports, else only its place."""
    try:
        entry.load()
    except Exception as error:  # a broken plug-in must not take the whole catalogue down
        warnings.warn(f"method {entry.name!r} of {entry.value} does not load: {error}", stacklevel=2)
    cls = registry._defined.get(entry.name)
    if cls is not None:
        return _class_card(cls)
    module, _, qualname = entry.value.partition(":")
    return MethodCard(
        name=entry.name, room="?", module=module, qualname=qualname, idea="", paper=None, verdict=Verdict()
    )
