"""A policy attached to a model: what attention and cache call, and how all of it is taken back."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from vestige.context.attention import attend
from vestige.context.blockwise import in_blocks
from vestige.context.cache import KeptCache
from vestige.context.layer import KeptLayer
from vestige.context.policy import CachePolicy, Evict
from vestige.context.rotary import Rotary
from vestige.context.slots import GraphedForward
from vestige.core.anatomy import Anatomy
from vestige.core.own_attention import OwnAttention
from vestige.core.patch import Patch
from vestige.errors import InputError, PatchError

__all__ = ["Kept"]

ATTENTION = "vestige"  # name under which attention is registered while a policy is attached


class Kept:
    """A policy attached to a model: what the model's cache holds, until undone.

    Made by :meth:`vestige.context.policy.CachePolicy.attach`; a context manager. The model makes its own kept cache
    whenever it would have made a cache; :meth:`new_cache` makes one to pass as ``past_key_values``.
    """

    def __init__(
        self, model: nn.Module, policy: CachePolicy, *, graph: bool | None = None, compile: bool = False
    ) -> None:
        anatomy = Anatomy.of(model)
        owner = getattr(policy, "name", type(policy).__name__)  # Together has no name of its own
        anatomy.need_causal(owner)
        policy = policy.on(anatomy)
        policy.check_model(anatomy)
        self.policy, self.anatomy = policy, anatomy
        self._rotary = Rotary.of(anatomy) if policy.needs_rotary else None
        self.cache: KeptCache | None = None
        self._running: KeptCache | None = None
        self._lasting = True  # whether the running cache outlives its pass
        self._again = 0  # tokens that are read once more before those that come
        self._watchers: list[Callable[..., None]] = []
        self._own = OwnAttention(anatomy.config._attn_implementation)
        self._patch = Patch(model, owner, claims={"kv-cache"})
        self._patch.attention(ATTENTION, _attention, _mask, part=anatomy.base)
        self._patch.hook(anatomy.base, self._before, kind="forward_pre", with_kwargs=True)
        self._patch.hook(anatomy.base, self._after, kind="forward")
        for layer in anatomy.layers:
            _attached[layer.attention] = self
            if layer.mlp is not None:
                self._patch.attribute(layer.mlp, "forward", in_blocks(layer.mlp.forward))
        self._graph, self.compile = graph, compile
        if graph is not False and torch.cuda.is_available():
            self._patch.attribute(model, "forward", GraphedForward(self, model).wrapped())

    @property
    def model(self) -> nn.Module:
        """The model attached to."""
        return self._patch.model

    def new_cache(self) -> KeptCache:
        """An empty cache that keeps what the policy keeps."""
        return KeptCache(self.policy, self.anatomy.num_layers, self._rotary)

    @property
    def nbytes(self) -> int:
        """Bytes of storage that the latest cache holds (0 before the first pass)."""
        return self.cache.nbytes if self.cache is not None else 0

    @property
    def nbytes_by_part(self) -> dict[str, int]:
        """Those bytes by part: ``keys``, ``values``, ``positions``, ``state``."""
        return self.cache.nbytes_by_part() if self.cache is not None else {}

    def positions(self, layer: int) -> Tensor:
        """Original positions held in a layer, ``(batch, kv_heads, slots)``; -1 marks an empty slot.

        Raises:
            InputError: nothing has been run yet, or there is no such layer.
        """
        if self.cache is None:
            raise InputError("the cache is empty: run the model first")
        if not 0 <= layer < len(self.cache.layers):
            raise InputError(f"layer {layer} is not there; the model has layers 0 to {len(self.cache.layers) - 1}")
        return self.cache.positions(layer)

    def graph_mode(self, cache: KeptCache) -> int | None:
        """How a decoding step can be captured: the new entry appended (0), or in the place of the lowest by
        attention (1) or by position (2); ``None`` where shapes or masks do not stay fixed."""
        policy, config = cache.policy, self.anatomy.config
        fixed = (
            self._graph is not False
            and all(type(layer) is KeptLayer and layer.slots for layer in cache.layers)
            and isinstance(policy, Evict)
            and policy.lag == 1
            and _present_in_slots(policy, cache)
            and type(policy).respond is CachePolicy.respond
            and not policy.needs_queries
            and not any(self.anatomy.sliding_windows)
            and getattr(config, "attn_logit_softcapping", None) is None
            and cache.layers[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
        )
        if not fixed:
            return None
        assert isinstance(policy, Evict)
        if cache.frozen or not policy.acts(decoding=True):
            return 0 if self._graph or policy.budget != 1.0 else None
        return {"mass": 1, "position": 2}.get(policy.decode_rank) if isinstance(policy.budget, int) else None

    def watch(self, function: Callable[..., None]) -> _Watch:
        """Call ``function(layer, query, keys, positions, scaling)`` at every attention, before entries are dropped.

        ``query`` is ``(batch, heads, count, dim)``; ``keys`` ``(batch, kv_heads, slots, dim)`` end with the new
        entries (when decoding within a budget the new one stands in the slot it was given); ``positions`` is
        ``(batch, kv_heads, slots)`` or ``None`` while slot *i* holds token *i*.
        """
        self._watchers.append(function)
        return _Watch(self._watchers, function)

    def undo(self) -> None:
        """Give the model back as it was. The cache stays readable."""
        self._patch.undo()
        self._running = None
        for layer in self.anatomy.layers:
            if _attached.get(layer.attention) is self:
                del _attached[layer.attention]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Put a kept cache where the model would use one of its own, and tell it what comes."""
        if args:
            args, kwargs = (), dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        cache = kwargs.get("past_key_values")
        self._lasting = True
        uses_cache = kwargs.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self.anatomy.config, "use_cache", False) and not module.training
        if not isinstance(cache, KeptCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise PatchError(
                    f"{self.policy.name} is attached, but the cache passed was filled without it; "
                    "pass one of Kept.new_cache(), or none"
                )
            self._lasting = bool(uses_cache) or cache is not None
            if not (self._lasting or self.policy.without_cache):
                self._running, self._again = None, 0
                return args, kwargs
            cache = self.new_cache()
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        inputs = kwargs[name]
        if cache.slots_step is not None:
            self._running = cache
            return args, kwargs
        if name == "input_ids" and kwargs.get("attention_mask") is None and cache.get_seq_length() == 0:
            _refuse_bare_padding(inputs, self.anatomy.config)
        fed = self.policy.reread(cache, name, inputs)
        self._again = fed.shape[1] - inputs.shape[1]
        if self._again:
            cache.rewind(self._again)
            kwargs = {**_earlier(kwargs, self._again), name: fed}
        cache.begin(fed.shape[0], fed.shape[1], kwargs.get("attention_mask"), fed.device)
        self._running = cache
        if self._lasting:
            self.cache = cache
        return args, {**kwargs, "past_key_values": cache, "use_cache": self._lasting}

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Give the caller what was asked for: the tokens that are new, and the cache if it is to last."""
        if self._running is not None:
            self._running.step = None  # what it holds is no part of the cache, and would stay with it
        passing, again = self._running is not None and not self._lasting, self._again
        self._running, self._again = None, 0
        if not (passing or again):
            return output
        fields = dict(output)
        if passing:
            fields.pop("past_key_values", None)
        for name in ("last_hidden_state", "hidden_states"):
            states = fields.get(name)
            if states is not None:
                every = isinstance(states, tuple)
                fields[name] = tuple(one[:, again:] for one in states) if every else states[:, again:]
        return type(output)(**fields)

    def _untouched(self) -> bool:
        """Whether the model's own attention can serve: no kept cache, or one from which nothing can be missing."""
        cache = self._running
        if cache is None:
            return True
        if cache.slots_step is not None:
            return False
        return cache.policy.plain and not cache.frozen

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cache = self._running
        if cache is None or self._untouched():
            if cache is not None and self._watchers:
                layer = cache.layers[module.layer_idx]
                for watcher in self._watchers:
                    watcher(layer.index, query, layer.keys, layer.positions, _scaling(query, kwargs.get("scaling")))
            return self._own.function(module)(module, query, key, value, attention_mask, **kwargs)
        if cache.slots_step is not None:
            return cache.slots_step.attend(module.layer_idx, query, _scaling(query, kwargs.get("scaling"))), None
        assert cache.step is not None
        return attend(
            module,
            query,
            cache.layers[module.layer_idx],
            scaling=_scaling(query, kwargs.pop("scaling", None)),
            policy=cache.policy,
            step=cache.step,
            watchers=self._watchers,
            **kwargs,
        )


# Which attachment an attention module belongs to. The functions that transformers calls are global, and one
# name serves every model, so they find their attachment here.
_attached: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


@torch.compiler.disable  # the attachment is looked up and its state written: nothing for a traced graph
def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    kept = _attached.get(module)
    if kept is None:  # a model that shares the config object of the one attached
        owner = _of_config(module.config)
        return owner._own.function(module)(module, *args, **kwargs)
    return kept._attend(module, *args, **kwargs)


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    kept = _of_config(config)
    return kept._own.mask(*args, config=config, **kwargs) if kept._untouched() else None


def _of_config(config: Any) -> Kept:
    """The attachment of a config; of several models that share it, the one that is running."""
    found = {id(kept): kept for kept in _attached.values() if kept.anatomy.config is config}
    return max(found.values(), key=lambda kept: kept._running is not None)


def _refuse_bare_padding(ids: Tensor, config: Any) -> None:
    """Raise :class:`InputError` for a batch of which some rows are padded and no mask says so: padding would be kept,
    ranked and attended to as if it were text."""
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if pad is None or ids.shape[0] == 1:
        return
    begins = ids[:, 0] == pad
    rows = begins & ~begins.all()
    if pad not in (ends if isinstance(ends, list) else [ends]):  # else a row may well end with it
        rows = rows | (ids[:, -1] == pad)
    if bool(rows.any()):
        raise InputError(
            f"input_ids: row {int(rows.nonzero()[0])} begins or ends with the padding token {pad}, and there is no "
            "attention_mask; pass the one that the tokenizer returned"
        )


def _present_in_slots(policy: Evict, cache: KeptCache) -> bool:
    """Whether what the policy does to its entries before each step can be done in fixed slots."""
    if type(policy).present is CachePolicy.present:
        return True
    return type(policy).turned is not CachePolicy.turned and min(cache.real) >= policy.sinks


def _earlier(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """Positions and mask of inputs that begin ``count`` tokens earlier."""
    changed = dict(kwargs)
    for name in ("position_ids", "cache_position"):
        positions = kwargs.get(name)
        if positions is not None:
            before = torch.arange(-count, 0, device=positions.device) + positions[..., :1]
            changed[name] = torch.cat([before, positions], dim=-1)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] == 1:
        changed["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
    return changed


def _scaling(query: Tensor, given: float | None) -> float:
    return query.shape[-1] ** -0.5 if given is None else given


class _Watch:
    """A watcher that can be taken off again."""

    def __init__(self, watchers: list[Callable[..., None]], function: Callable[..., None]) -> None:
        self._watchers, self._function = watchers, function

    def remove(self) -> None:
        if self._function in self._watchers:
            self._watchers.remove(self._function)
