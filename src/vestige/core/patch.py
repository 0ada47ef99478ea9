"""Every change to a user's model, undoable.

:class:`Patch` is the only thing in Vestige that touches a model which a user handed over. What it
did is known here, never on the model, and is held so that the model can be freed at any time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import nn

from vestige.core.changes import (
    AttentionChange,
    AttributeChange,
    Change,
    HookChange,
    ParameterChange,
    uninterrupted,
)
from vestige.core.method import did_you_mean, nearest
from vestige.errors import PatchConflictError, PatchError, UnsupportedModelError

__all__ = ["Patch"]

HookKind = Literal["forward", "forward_pre", "backward", "backward_pre"]

_patches: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()


class Patch:
    """The changes that one attachment makes to one model.

    Used in a ``with`` block, everything is taken back on any way out of the block; :meth:`undo` does
    the same by hand. Undoing restores every object, value and hook bit for bit. A change that fails
    takes back all earlier ones of the same patch, and the patch is then over.

    Patches of one model may overlap. Changes to the same attribute form a chain, and may be undone in
    any order. Parameters changed in place may only be undone last first.

    Args:
        model: any module; patches of a model and of a part of it know of each other.
        owner: who attaches, as it should be named in errors.
        claims: names of the parts that this attachment must have to itself, such as ``"kv-cache"``.

    Raises:
        PatchConflictError: a live patch of this model claims the same part.
    """

    def __init__(self, model: nn.Module, owner: str, claims: Iterable[str] = ()) -> None:
        if not isinstance(model, nn.Module):
            raise PatchError(f"{owner}: model is a {type(model).__name__}; allowed: a torch.nn.Module")
        self.owner = owner
        self.claims = frozenset((claims,) if isinstance(claims, str) else claims)
        for other in self.active(model):
            for claim in sorted(self.claims & other.claims):
                raise PatchConflictError(
                    f"{owner!r} cannot share this model with {other.owner!r}: each must have the {claim} to itself; "
                    f"undo {other.owner!r} first"
                )
        self._model = weakref.ref(model)
        self._changes: list[Change] = []
        self._over = False
        _patches.setdefault(model, []).append(self)

    @property
    def model(self) -> nn.Module:
        """The model; a patch does not keep it alive."""
        model = self._model()
        if model is None:
            raise PatchError(f"{self.owner}: the patched model no longer exists")
        return model

    @staticmethod
    def active(model: nn.Module) -> tuple[Patch, ...]:
        """The live patches of a model, of what it is part of and of its parts, oldest first."""
        modules = set(map(id, model.modules()))
        found = []
        for other, patches in list(_patches.items()):
            if any(id(module) in modules for module in other.modules()):
                found.extend(patches)
        return tuple(found)

    def attribute(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of any object that belongs to the model; it may be new.

        Raises:
            PatchError: the attribute refuses the value, or the target is a class or a Python module,
                which all models share.
        """
        self._make(lambda: [AttributeChange(target, name, value, self.owner)])

    def module(self, where: str | nn.Module, new: nn.Module) -> None:
        """Put another module in the place of one: of a dotted path, or of a module wherever it stands.

        The new module takes on the training mode of the old; device and dtype are the caller's matter.

        Raises:
            PatchError: the model has no such module, or it is the model itself.
        """

        def changes() -> list[Change]:
            places = self._places(where)
            new.train(getattr(*places[0]).training)
            return [AttributeChange(parent, name, new, self.owner) for parent, name in places]

        self._make(changes)

    def hook(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        kind: HookKind = "forward",
        *,
        with_kwargs: bool = False,
        prepend: bool = False,
    ) -> None:
        """Add a hook to a module of the model; the arguments are those of torch's ``register_…_hook``.

        Raises:
            PatchError: the module is no part of the model, the kind is unknown, or ``with_kwargs`` is asked of a
                backward hook.
        """

        def changes() -> list[Change]:
            if not any(part is module for part in self.model.modules()):
                raise PatchError(f"{self.owner}: {type(module).__name__} is no part of the patched model")
            return [HookChange(module, function, kind, self.owner, with_kwargs=with_kwargs, prepend=prepend)]

        self._make(changes)

    def parameter(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Change the values of a parameter or buffer in place; the original values are kept, on its device.

        The values, of the parameter's shape, are cast to its dtype and device.

        Raises:
            PatchError: the tensor is no parameter or buffer of the model, or the shapes differ.
        """

        def changes() -> list[Change]:
            named = [*self.model.named_parameters(), *self.model.named_buffers()]
            name = next((name for name, tensor in named if tensor is parameter), None)
            if name is None:
                raise PatchError(
                    f"{self.owner}: a tensor of shape {tuple(parameter.shape)} is no parameter or buffer of the model"
                )
            return [ParameterChange(parameter, values, self.owner, name)]

        self._make(changes)

    def config(self, config: Any, name: str, value: Any) -> None:
        """Set a field that a config has.

        Raises:
            PatchError: the config has no such field, or refuses the value.
        """

        self._make(lambda: self._field(config, name, value))

    def generation(self, name: str, value: Any) -> None:
        """Set a field of the model's generation config.

        Raises:
            PatchError: the model has no generation config, or that has no such field.
        """

        def changes() -> list[Change]:
            config = getattr(self.model, "generation_config", None)
            if config is None:
                raise PatchError(f"{self.owner}: {type(self.model).__name__} has no generation config")
            return self._field(config, name, value)

        self._make(changes)

    def attention(
        self,
        name: str,
        function: Callable[..., Any],
        mask_function: Callable[..., Any] | None = None,
        part: nn.Module | None = None,
    ) -> None:
        """Let the model's attention layers compute attention with ``function``.

        The function is registered under ``name`` in transformers' ``AttentionInterface``, the mask function in
        ``AttentionMaskInterface`` (without one, no masks are made), for as long as a patch uses it; every config
        that the layers read is set to the name. Both functions are global, so they must not refer to a model:
        they are given the attention module, or the config, and find the rest by that. Models that were built from
        the same config object share it, so the function may also be called for layers of another such model.

        Args:
            name: the attention implementation's name.
            function: as transformers describes attention functions.
            mask_function: as transformers describes mask functions.
            part: the part of the model whose attention is meant (the language model of several); all of it if None.

        Raises:
            UnsupportedModelError: the model's attention does not go through ``AttentionInterface``.
            PatchConflictError: another function is registered under the name by another patch.
            PatchError: transformers itself knows an attention function of that name.
        """

        def changes() -> list[Change]:
            root = self.model if part is None else part
            configs = _attention_configs(root, self.owner)
            return [
                AttentionChange(name, function, mask_function, self.owner),
                *(AttributeChange(config, "_attn_implementation_internal", name, self.owner) for config in configs),
            ]

        self._make(changes)

    @contextmanager
    def building(self) -> Iterator[Self]:
        """Undo the patch if the block raises, keep it otherwise: for code that attaches in several steps."""
        try:
            yield self
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Take back every change, the last first; a second call does nothing.

        Raises:
            PatchError: a later patch changed the same parameter in place; nothing has been undone then.
        """
        if self._over:
            return
        for blocker in (later for change in self._changes for later in change.blockers()):
            if blocker not in self._changes:
                raise PatchError(
                    f"{self.owner!r} cannot be undone yet: {blocker.owner!r} changed the same parameter after it; "
                    f"undo {blocker.owner!r} first"
                )
        with uninterrupted():
            while self._changes:
                self._changes[-1].revert()
                self._changes.pop()
            self._over = True
            model = self._model()
            if model is not None:
                remaining = [patch for patch in _patches.get(model, []) if patch is not self]
                if remaining:
                    _patches[model] = remaining
                else:
                    _patches.pop(model, None)

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._over else f"{len(self._changes)} changes"
        return f"Patch({self.owner!r}, {state})"

    def _make(self, changes: Callable[[], list[Change]]) -> None:
        """Prepare and make changes; if anything goes wrong, take back all that this patch ever did."""
        self._require_open()
        try:
            with uninterrupted():
                for change in changes():
                    change.make()
                    self._changes.append(change)
        except BaseException:
            self.undo()
            raise

    def _require_open(self) -> None:
        if self._over:
            raise PatchError(f"{self.owner}: this patch has been undone; attach anew")

    def _field(self, config: Any, name: str, value: Any) -> list[Change]:
        if not hasattr(config, name):
            known = [key for key in vars(config) if not key.startswith("_")]
            raise PatchError(
                f"{self.owner}: {type(config).__name__} has no field {name!r}; {did_you_mean(name, known)}"
            )
        return [AttributeChange(config, name, value, self.owner)]

    def _places(self, where: str | nn.Module) -> list[tuple[nn.Module, str]]:
        """The parents, and names under them, of a module of the model."""
        if isinstance(where, str):
            parents = dict(self.model.named_modules(remove_duplicate=False))
            path, _, name = where.rpartition(".")
            if where in parents and where:
                return [(parents[path], name)]
            raise PatchError(
                f"{self.owner}: the model has no part {where!r}; nearest: {', '.join(nearest(where, parents))}"
            )
        model = self.model
        found = [
            (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is where
        ]
        if not found:
            raise PatchError(f"{self.owner}: {type(where).__name__} stands nowhere inside the patched model")
        return found


def _attention_configs(root: nn.Module, owner: str) -> list[Any]:
    """The configs, each once, that say to the layers under a module how to compute attention."""
    from transformers import PreTrainedConfig, PreTrainedModel

    for module in root.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"{owner}: {type(module).__name__} does not compute attention through transformers' AttentionInterface"
            )
    held = (getattr(module, "config", None) for module in root.modules())
    configs = {
        id(c): c for c in held if isinstance(c, PreTrainedConfig) and hasattr(c, "_attn_implementation_internal")
    }
    if not configs:
        raise UnsupportedModelError(f"{owner}: {type(root).__name__} holds no attention layers of transformers")
    return list(configs.values())
