"""The single changes of which a patch is made: each can be made once and taken back exactly.

A change holds its target (a module, a config, a parameter) weakly, so that nothing here keeps a
model alive. Changes to the same attribute form a chain in the order in which they were made: taking
back a lower one hands what it had found to the next one above, whose value stays.
"""

from __future__ import annotations

import inspect
import itertools
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from vestige.errors import PatchConflictError, PatchError

__all__ = ["AttentionChange", "AttributeChange", "Change", "HookChange", "ParameterChange", "uninterrupted"]

_serials = itertools.count()
_live: weakref.WeakSet[Change] = weakref.WeakSet()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C until the block is through: a change is made and recorded, or neither."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _weakly(target: Any) -> Callable[[], Any]:
    """A reference to the target that returns None once it is gone (strong for the few types that allow no other)."""
    try:
        return weakref.ref(target)
    except TypeError:
        return lambda: target


class Change:
    """One reversible change, made by the patch of ``owner``."""

    def __init__(self, target: Any, owner: str) -> None:
        self.owner = owner
        self.serial = next(_serials)
        self._target = _weakly(target)

    def make(self) -> None:
        """Make the change; on an exception nothing has changed."""
        self._make()
        _live.add(self)

    def revert(self) -> None:
        """Take the change back."""
        target = self._target()
        if self in _live and target is not None:
            self._revert(target)
        _live.discard(self)

    def blockers(self) -> list[Change]:
        """Later changes that have to be taken back before this one."""
        return []

    def _make(self) -> None:
        raise NotImplementedError

    def _revert(self, target: Any) -> None:
        raise NotImplementedError

    def _later(self, same: Callable[[Any], bool]) -> list[Any]:
        """Live changes of this kind to the same thing, made after this one, oldest first."""
        found = [c for c in _live if type(c) is type(self) and c.serial > self.serial and same(c)]
        return sorted(found, key=lambda change: change.serial)


@dataclass(frozen=True)
class _Found:
    """What an attribute was: where it lived on its object, and its value."""

    place: str
    value: Any = None


_ABSENT, _DESCRIPTOR, _INSTANCE = "absent", "descriptor", "instance"
_KINDS = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}


def _places(target: Any) -> dict[str, dict[str, Any]]:
    places = {place: getattr(target, place) for place in _KINDS} if isinstance(target, nn.Module) else {}
    return {**places, _INSTANCE: vars(target)} if hasattr(target, "__dict__") else places


def _read(target: Any, name: str) -> _Found:
    if hasattr(inspect.getattr_static(type(target), name, None), "__set__"):
        return _Found(_DESCRIPTOR, getattr(target, name))
    for place, values in _places(target).items():
        if name in values:
            return _Found(place, values[name])
    return _Found(_ABSENT)


def _write_back(target: Any, name: str, found: _Found) -> None:
    """Put an attribute back where it was, past any ``__setattr__``: what was once there needs no validation."""
    if found.place == _DESCRIPTOR:
        setattr(target, name, found.value)
        return
    for place, values in _places(target).items():
        if place == found.place:
            values[name] = found.value
        else:
            values.pop(name, None)


class AttributeChange(Change):
    """An attribute of a module, a config or any other object."""

    def __init__(self, target: Any, name: str, value: Any, owner: str) -> None:
        if isinstance(target, type | ModuleType):
            raise PatchError(f"{owner}: {target!r} is shared by every model; patch an object of this model instead")
        super().__init__(target, owner)
        # Configs of transformers know some fields under two names; the chain needs one.
        self.name = getattr(target, "attribute_map", {}).get(name, name)
        self._value = value
        self._before = _Found(_ABSENT)

    def _make(self) -> None:
        target, value = self._target(), self._value
        self._value = None  # the object holds it now; another reference could keep the model alive
        self._before = _read(target, self.name)
        kind = _KINDS.get(self._before.place)
        if kind is not None:
            if value is not None and not isinstance(value, kind):
                raise PatchError(
                    f"{self.owner}: {type(target).__name__}.{self.name} is a {kind.__name__}, "
                    f"which a {type(value).__name__} cannot replace"
                )
            _places(target)[self._before.place][self.name] = value
            return
        try:
            setattr(target, self.name, value)
        except Exception as error:
            with suppress(Exception):  # what refused the new value may have no setter at all
                _write_back(target, self.name, self._before)
            raise PatchError(
                f"{self.owner}: {type(target).__name__}.{self.name} cannot be set to {value!r}: {error}"
            ) from error

    def _revert(self, target: Any) -> None:
        later = self._later(lambda other: other.name == self.name and other._target() is target)
        if later:
            later[0]._before = self._before
        else:
            _write_back(target, self.name, self._before)


class HookChange(Change):
    """A hook on a module."""

    KINDS: ClassVar[dict[str, str]] = {
        "forward": "register_forward_hook",
        "forward_pre": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward_pre": "register_full_backward_pre_hook",
    }

    def __init__(self, module: nn.Module, hook: Callable[..., Any], kind: str, owner: str, **options: bool) -> None:
        if kind not in self.KINDS:
            raise PatchError(f"{owner}: hook kind is {kind!r}; allowed: {', '.join(self.KINDS)}")
        if kind.startswith("backward") and options.pop("with_kwargs", False):
            raise PatchError(f"{owner}: a {kind} hook cannot be given keyword arguments; with_kwargs must be False")
        super().__init__(module, owner)
        self.kind = kind
        self._arguments: tuple[Callable[..., Any], dict[str, bool]] | None = (hook, options)

    def _make(self) -> None:
        assert self._arguments is not None
        hook, options = self._arguments
        self._arguments = None  # the module holds the hook now, which may refer to the model
        try:
            self._handle = getattr(self._target(), self.KINDS[self.kind])(hook, **options)
        except RuntimeError as error:  # torch does not mix full and old-style backward hooks
            raise PatchError(f"{self.owner}: {error}") from error

    def _revert(self, target: nn.Module) -> None:
        self._handle.remove()
        if self.kind == "backward" and not target._backward_hooks:
            target._is_full_backward_hook = None  # as torch leaves a module that never had one


class ParameterChange(Change):
    """The values of a parameter or buffer, changed in place; the original values are kept beside it."""

    def __init__(self, tensor: torch.Tensor, values: torch.Tensor, owner: str, name: str) -> None:
        if values.shape != tensor.shape:
            raise PatchError(
                f"{owner}: new values of {name} have shape {tuple(values.shape)}; allowed: {tuple(tensor.shape)}"
            )
        if values.is_complex() and not tensor.is_complex():
            raise PatchError(f"{owner}: new values of {name} are complex, the parameter is {tensor.dtype}")
        super().__init__(tensor, owner)
        self.name = name
        self._values: torch.Tensor | None = values

    @torch.no_grad()
    def _make(self) -> None:
        tensor = self._target()
        self._before = tensor.detach().clone()
        values, self._values = self._values, None
        try:
            tensor.copy_(values)
        except BaseException:
            tensor.copy_(self._before)
            raise

    @torch.no_grad()
    def _revert(self, target: torch.Tensor) -> None:
        target.copy_(self._before)

    def blockers(self) -> list[Change]:
        target = self._target()
        if target is None or self not in _live:
            return []
        return self._later(lambda other: _overlap(other._target(), target))


def _overlap(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Whether two tensors share memory."""
    if a is None or a is b:
        return a is b
    (first, end), (other, other_end) = _extent(a), _extent(b)
    return first != 0 and a.device == b.device and first < other_end and other < end


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@dataclass
class _Registered:
    function: Callable[..., Any]
    mask_function: Callable[..., Any] | None
    owner: str
    users: int = 0


_attention: dict[str, _Registered] = {}


class AttentionChange(Change):
    """An attention function, and the function that makes its masks, known to transformers under a name."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        mask_function: Callable[..., Any] | None,
        owner: str,
    ) -> None:
        super().__init__(function, owner)
        self.name = name
        self._wanted = _Registered(function, mask_function, owner)

    def _make(self) -> None:
        wanted, known = self._wanted, _attention.get(self.name)
        if known is None:
            _register(self.name, wanted)
            known = _attention[self.name] = wanted
        elif (known.function, known.mask_function) != (wanted.function, wanted.mask_function):
            raise PatchConflictError(
                f"{self.owner!r} cannot register the attention function {self.name!r}: "
                f"{known.owner!r} has registered another under that name"
            )
        known.users += 1
        # Tied to this object, so that a model that is thrown away with its patch still attached leaves nothing.
        self._release = weakref.finalize(self, _release, self.name)
        self._release.atexit = False

    def revert(self) -> None:
        self._release()  # whether or not the model still exists
        _live.discard(self)


def _interfaces() -> tuple[Any, Any]:
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def _register(name: str, wanted: _Registered) -> None:
    functions, masks = _interfaces()
    if name == "eager" or name in functions() or name in masks():
        raise PatchError(f"{wanted.owner}: transformers already has an attention function named {name!r}")
    functions.register(name, wanted.function)
    if wanted.mask_function is not None:
        masks.register(name, wanted.mask_function)


def _release(name: str) -> None:
    known = _attention[name]
    known.users -= 1
    if known.users == 0:
        del _attention[name]
        # transformers can register but not unregister; the table of the class is what `register` writes to.
        for interface in _interfaces():
            interface._global_mapping.pop(name, None)
