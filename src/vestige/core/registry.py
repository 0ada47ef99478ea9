"""What is registered, found without importing it.

A method registers by being defined, as every :class:`~vestige.core.spec.Spec` does. To list methods, or to find the
module that defines one, nothing is imported: the files of the package are read, and the head of each class (docstring,
``name``, ``paper``, ``verdict``) is parsed. That keeps ``vestige methods`` fast, and means that a new file needs no
entry anywhere. Tasks have a registry of their own (:mod:`vestige.evidence.tasks.registry`), which works likewise.

Third parties add methods through the entry point group ``vestige.methods``; an entry's name is the
method's name, its value the class (or the module that defines it).
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.core.method import Method, Paper, Verdict
from vestige.core.spec import Spec, did_you_mean
from vestige.errors import SpecError, VestigeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Card", "MethodCard", "Registry", "method", "methods", "registry"]

ENTRY_POINTS = "vestige.methods"
ROOMS = ("context", "layers", "models", "stores", "weights", "training", "evidence")
TASKS = "evidence/tasks"  # the folder whose classes are registered as tasks
PROOFS = ("evidence/certify", "evidence/claims", "evidence/references", "evidence/report")  # no methods in there


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a registered class without importing it.

    Fields that a kind of card adds are class attributes of the same name, written as literals.
    """

    name: str
    room: str
    module: str
    qualname: str
    idea: str


@dataclass(frozen=True, kw_only=True)
class MethodCard(Card):
    """What is known of a method without importing it."""

    paper: Paper | None = None
    verdict: Verdict = field(default_factory=Verdict)


class Registry:
    """Names to classes of one kind, loaded when asked for.

    Args:
        kind: what the classes are called in error texts.
        card: what is known of each without importing it.
        folders: of the package, where they are defined.
        without: folders below those, where classes of other kinds are defined.
        group: of the entry points through which third parties add theirs.
    """

    def __init__(
        self,
        kind: str,
        card: type[Card],
        *,
        folders: Sequence[str],
        without: Sequence[str] = (),
        group: str,
    ) -> None:
        self.kind, self.group = kind, group
        self.card_type: Any = card
        self.folders, self.without = tuple(folders), tuple(without)
        self._defined: dict[str, type[Any]] = {}

    def add(self, cls: type[Spec]) -> None:
        """Register a class that has just been defined.

        Raises:
            SpecError: the name is taken by a class of another place.
        """
        taken = self._defined.get(cls.name)
        place = (cls.__module__, cls.__qualname__)
        if taken is not None and (taken.__module__, taken.__qualname__) != place:
            raise SpecError(
                f"{self.kind} name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} must choose another"
            )
        self._defined[cls.name] = cls

    def cards(self, room: str | None = None) -> list[Any]:
        """The cards of all known classes, by room and name; only one room's if named.

        Raises:
            SpecError: there is no such room.
        """
        if room is not None and room not in ROOMS:
            raise SpecError(f"unknown room {room!r}; {did_you_mean(room, ROOMS)}")
        found = {card.name: card for card in self.package_cards()}
        for entry in _entries(self.group):
            found.setdefault(entry.name, self._entry_card(entry))
        for cls in self._defined.values():
            found.setdefault(cls.name, self.class_card(cls))
        chosen = [card for card in found.values() if room in (None, card.room)]
        return sorted(chosen, key=lambda card: (card.room, card.name))

    def card(self, name: str) -> Any:
        """One class's card.

        Raises:
            SpecError: unknown name, with the nearest known ones.
        """
        cards = {card.name: card for card in self.cards()}
        if not isinstance(name, str) or name not in cards:
            raise SpecError(f"unknown {self.kind} {name!r}; {did_you_mean(str(name), cards)}")
        return cards[name]

    def load(self, name: str) -> type[Any]:
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
            raise SpecError(f"{self.kind} {name!r} does not load, {card.module} fails: {error}") from error
        if name not in self._defined:
            raise SpecError(f"{card.module} was imported but does not define the {self.kind} {name!r}")
        return self._defined[name]

    def package_cards(self) -> tuple[Any, ...]:
        """What the package's own files define, read from their text."""
        return _package_cards(self.card_type, self.folders, self.without)

    def class_card(self, cls: type[Any]) -> Any:
        """The card of a class that is there."""
        parts = cls.__module__.split(".")
        room = parts[1] if parts[0] == "vestige" and len(parts) > 1 else getattr(cls, "room", parts[0])
        own = {name: getattr(cls, name) for name in _own_fields(self.card_type)}
        place = {"room": room, "module": cls.__module__, "qualname": cls.__qualname__}
        return self.card_type(name=cls.name, idea=_idea(cls.__doc__), **place, **own)

    def _entry_card(self, entry: EntryPoint) -> Any:
        """A third party's card: read from the class if it imports, else only its place."""
        try:
            entry.load()
        except Exception as error:  # a broken plug-in must not take the whole catalogue down
            warnings.warn(f"{self.kind} {entry.name!r} of {entry.value} does not load: {error}", stacklevel=2)
        if entry.name in self._defined:
            return self.class_card(self._defined[entry.name])
        module, _, qualname = entry.value.partition(":")
        return self.card_type(name=entry.name, room="?", module=module, qualname=qualname, idea="")


registry = Registry("method", MethodCard, folders=ROOMS, without=(TASKS, *PROOFS), group=ENTRY_POINTS)


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


def _own_fields(card: type[Card]) -> list[str]:
    """The fields that a kind of card adds."""
    common = {own.name for own in fields(Card)}
    return [own.name for own in fields(card) if own.name not in common]


@functools.cache
def _package_cards(card: Any, folders: tuple[str, ...], without: tuple[str, ...]) -> tuple[Card, ...]:
    root = Path(__file__).resolve().parent.parent
    skipped = {root / folder for folder in without}
    files = []
    for folder in folders:
        for place, below, names in os.walk(root / folder):
            below[:] = [name for name in sorted(below) if Path(place, name) not in skipped]
            files += [Path(place, name) for name in sorted(names) if name.endswith(".py")]
    return tuple(found for path in files for found in _file_cards(card, path, root))


def _file_cards(card: type[Card], path: Path, root: Path) -> Iterable[Card]:
    data = path.read_bytes()
    if b"\n    name" not in data:
        return
    text = data.decode("utf-8").replace("\r\n", "\n")
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
            read = {key: _literal(values.get(key), text) for key in _own_fields(card)}
            yield card(
                name=name,
                room=folders[0],
                module=module,
                qualname=match[1],
                idea=_idea(ast.get_docstring(head)),
                **{key: value for key, value in read.items() if value is not None},
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


@functools.cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))
