"""Values that are described by a name and parameters, and registered under that name.

A :class:`Spec` is a frozen, keyword-only dataclass. It validates itself when it is built, says what it is as plain
JSON types and is built again from them. Methods and tasks are such values; each kind has a registry of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, dataclass_transform

from vestige.errors import SpecError

if TYPE_CHECKING:
    from vestige.core.registry import Registry

__all__ = ["Spec", "did_you_mean", "nearest", "param"]


def param(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a parameter: its default, one line of help, and its range.

    The annotation gives the type (``int | float``, ``Literal["a", "b"]``, ``tuple[int, ...]``,
    another spec class ...); the bounds apply to numbers and are checked when the object is built.
    """
    bounds = {k: v for k, v in {"gt": gt, "ge": ge, "lt": lt, "le": le}.items() if v is not None}
    metadata = {"help": help, "bounds": bounds}
    return dataclasses.field(default=default, default_factory=factory, kw_only=True, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Spec:
    """Base of everything that is described by a name and parameters.

    Class attributes
        name: the slug under which a class is registered (an abstract base has none).

    Raises:
        SpecError: on construction, for an unknown parameter, a wrong type or a value out of range.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)
        _accept_keywords_with_clear_errors(cls)
        if "name" in cls.__dict__:
            cls.check_class()
            cls.registry().add(cls)

    @classmethod
    def registry(cls) -> Registry:
        """Where classes of this kind are found by name; each kind says."""
        raise NotImplementedError

    @classmethod
    def check_class(cls) -> None:
        """Refuse, with :class:`SpecError`, a named class that lacks what its kind must state."""

    def __post_init__(self) -> None:
        values = _validate(type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})  # type: ignore[arg-type]
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self.check()

    def check(self) -> None:
        """Check relations between parameters; override and raise :class:`SpecError`."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some parameters changed, validated anew."""
        return type(self)(**{**self._values(), **changes})

    def spec(self) -> dict[str, Any]:
        """The object as plain JSON types: its name and every parameter."""
        return {"name": self.name, **{key: _plain(value) for key, value in self._values().items()}}

    def to_json(self) -> str:
        """The spec as one line of JSON, keys in order of definition."""
        return json.dumps(self.spec())

    def to_yaml(self) -> str:
        """The spec as YAML."""
        import yaml

        return yaml.safe_dump(self.spec(), sort_keys=False)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any] | str) -> Self:
        """Build an object from a name, a mapping with ``name``, or JSON or YAML text of one.

        Raises:
            SpecError: the text cannot be read, the name is unknown (with the nearest names),
                a parameter is unknown, of a wrong type or out of range, or what is found is
                not of the class on which this was called.
        """
        data: Any = spec
        if isinstance(spec, str):
            data = _parse_text(spec)
            if isinstance(data, str):
                data = {"name": data}
        if not isinstance(data, Mapping):
            raise SpecError(f"a spec is a name or a mapping with 'name', not {type(data).__name__}: {data!r}")
        if "name" not in data:
            raise SpecError(f"the spec {dict(data)!r} lacks 'name'")
        found = cls.registry().load(data["name"])
        if not issubclass(found, cls):
            raise SpecError(_not_wanted(found, cls))
        return found.from_fields({key: value for key, value in data.items() if key != "name"})

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Build an object of this class from what its spec holds beside the name."""
        return cls(**fields)

    @classmethod
    def parameters(cls) -> dict[str, dict[str, Any]]:
        """Each parameter's ``type``, ``default`` (absent if required), ``help`` and ``bounds``."""
        hints = _hints(cls)  # type: ignore[arg-type]
        described = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            entry = {
                "type": _type_name(hints[field.name]),
                "help": field.metadata.get("help", ""),
                "bounds": _bounds_text(field.metadata.get("bounds", {})),
            }
            if field.default is not dataclasses.MISSING:
                entry["default"] = _plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                entry["default"] = _plain(field.default_factory())
            described[field.name] = entry
        return described

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let a parameter be such an object: one of the class, or its spec."""
        from pydantic_core import core_schema

        def build(value: Any) -> Spec:
            if isinstance(value, Spec) and not isinstance(value, source):
                raise SpecError(_not_wanted(type(value), source))
            return value if isinstance(value, source) else source.from_spec(value)

        return core_schema.no_info_plain_validator_function(build)


def nearest(name: str, known: typing.Iterable[str], most: int = 3) -> list[str]:
    """The known names closest to a mistyped one."""
    return difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error text that offers the nearest known names, or all where none is near."""
    known = sorted(known)
    close = nearest(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def _accept_keywords_with_clear_errors(cls: type[Spec]) -> None:
    """Turn Python's TypeError for a wrong keyword into a SpecError that names it."""
    plain_init = cls.__init__
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    needed = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    label = _label(cls)

    @functools.wraps(plain_init)
    def __init__(self: Spec, *args: Any, **values: Any) -> None:  # noqa: N807
        if args:
            raise SpecError(f"{label}: parameters are given by name ({', '.join(known)})")
        for key, value in values.items():
            if key not in known:
                raise SpecError(f"{label}: unknown parameter {key!r} (given {value!r}); {did_you_mean(key, known)}")
        for key in needed:
            if key not in values:
                raise SpecError(f"{label}: parameter {key!r} is required")
        plain_init(self, **values)

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _model(cls: type[Any]) -> Any:
    """A strict pydantic model of a class's parameters."""
    import pydantic

    hints = _hints(cls)  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        f.name: (hints[f.name], pydantic.Field(description=f.metadata.get("help", ""), **f.metadata.get("bounds", {})))
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    config = pydantic.ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _validate(cls: type[Spec], values: dict[str, Any]) -> dict[str, Any]:
    import pydantic

    values = {key: _tuples(value) for key, value in values.items()}
    try:
        checked = _model(cls)(**values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise SpecError(_explain(cls, values, error)) from None
    return {key: getattr(checked, key) for key in values}


def _explain(cls: type[Spec], values: dict[str, Any], error: Any) -> str:
    """One line for the first thing wrong: parameter, value, what is allowed."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "value_error" and isinstance(first.get("ctx", {}).get("error"), SpecError):
        return f"{_label(cls)}: parameter {key!r}: {first['ctx']['error']}"
    described = cls.parameters()[key]
    allowed = described["type"] + (f", {described['bounds']}" if described["bounds"] else "")
    return f"{_label(cls)}: parameter {key!r} is {values[key]!r}; allowed: {allowed}"


def _label(cls: type[Spec]) -> str:
    """What a class is called in errors: its name, or that of the class where it has none."""
    return getattr(cls, "name", cls.__name__)


def _tuples(value: Any) -> Any:
    """Lists become tuples, so that a spec stays hashable and JSON round-trips."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.spec()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _parse_text(text: str) -> Any:
    import yaml

    try:
        return json.loads(text)  # YAML would take JSON's 1e-05 for text
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"the spec is neither JSON nor YAML: {error}") from None


def _not_wanted(found: type[Spec], wanted: type[Spec]) -> str:
    return f"{_label(found)!r} is a {_family(found, wanted)}, where a {wanted.__name__} is wanted"


def _family(cls: type[Spec], wanted: type[Spec]) -> str:
    """The outermost base that a class does not share with the one wanted; where it shares all, the nearest one."""
    bases = [base for base in cls.__mro__[1:] if base is not Spec and issubclass(base, Spec)]
    apart = [base for base in bases if not issubclass(wanted, base)]
    return (apart or bases[:1] or [cls])[-1].__name__


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(repr(a) for a in typing.get_args(hint))
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _bounds_text(bounds: Mapping[str, float]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " and ".join(f"{signs[k]} {v}" for k, v in bounds.items())
