"""What a cache policy is, and how it is attached to a model.

A policy that evicts is three things, kept apart: a *score* that ranks the entries of a head (the
subclass), a *budget* (tokens, or a share of the tokens seen), and a *schedule* (after each chunk of the
prompt, while decoding, or both). Attached to a model, it makes the model's caches hold only what it keeps.
"""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vestige.context.attention import Look, attend
from vestige.context.cache import KeptCache, KeptLayer, Step, budget_tokens, per_row
from vestige.context.ragged_attention import StandIn
from vestige.context.rotary import Rotary
from vestige.context.slots import GraphedForward
from vestige.core.anatomy import Anatomy
from vestige.core.method import Method, param
from vestige.core.patch import Patch
from vestige.errors import InputError, PatchError, SpecError, UnsupportedModelError

__all__ = ["AttentionMass", "CachePolicy", "Evict", "Kept", "Ranking"]

ATTENTION = "vestige"  # name under which attention is registered while a policy is attached


class CachePolicy(Method):
    """A method that decides what generation keeps of its context, and what it reads of what it keeps.

    The hooks are called by the engine, layer after layer in each pass. As they stand here everything is kept and
    read; a policy overrides those that it needs.
    """

    needs_attention: ClassVar[bool] = False  # whether receive() is to be called
    needs_queries: ClassVar[bool] = False  # whether observe() is to be called while decoding, too
    needs_rotary: ClassVar[bool] = False  # whether the cache must know the model's turns by position
    without_cache: ClassVar[bool] = False  # whether the policy has something to do in a pass that keeps no cache

    @property
    def ranking(self) -> Ranking | None:
        """What ranks the entries where some are dropped; ``None`` where all are kept."""
        return None

    @property
    def plain(self) -> bool:
        """Whether attention, and what it leaves behind, is that of the model alone."""
        return False

    def on(self, anatomy: Anatomy) -> CachePolicy:
        """The policy as it acts on one model: what it has to know of that model filled in.

        Raises:
            SpecError: it cannot be known without :meth:`fit`.
        """
        return self

    def check_model(self, anatomy: Anatomy) -> None:
        """Raise :class:`UnsupportedModelError`, or :class:`SpecError` for a parameter, where a model will not do."""

    def new_layer(self, cache: KeptCache, index: int) -> KeptLayer:
        """What holds the entries of a layer."""
        return KeptLayer(cache, index)

    def with_budget(self, budget: int | float) -> CachePolicy:
        """The policy with another budget, for :meth:`KeptCache.cut`.

        Raises:
            SpecError: the policy keeps every entry.
        """
        raise SpecError(f"{self.name} keeps every entry: its cache cannot be cut")

    def lossless(self, tokens: int) -> CachePolicy | None:
        """The policy with parameters under which it changes nothing over that many tokens, or ``None``."""
        return None

    def reread(self, cache: KeptCache, name: str, inputs: Tensor) -> Tensor:
        """What to feed to the model: the inputs that come, after earlier ones that are to be read once more.

        ``name`` says which the ``inputs`` are: ``input_ids`` ``(batch, count)``, or ``inputs_embeds``.
        """
        return inputs

    def present(self, entries: KeptLayer, step: Step) -> None:
        """Make the entries ready to be attended to; the new ones are among them."""

    def places(self, entries: KeptLayer) -> Tensor:
        """Where attention takes each entry to stand, ``(batch, kv_heads, slots)``: what sliding windows go by."""
        return entries._positions(entries.slots)

    def respond(self, entries: KeptLayer, look: Look, step: Step, plain: Callable[[], Tensor]) -> Tensor:
        """Attention of the queries over the entries, ``(batch, count, heads, dim)``.

        ``plain`` gives that over all entries, and calls :meth:`receive` where the policy asks for it.
        """
        return plain()

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        """Take note of how a chunk's queries looked at the entries, the chunk's own included; before entries go.

        While decoding it is called, with one query, where the policy ``needs_queries``.
        """

    def receive(self, entries: KeptLayer, share: Tensor, step: Step) -> None:
        """Take note of one token's attention weights, ``(batch, kv_heads, group, slots)``; asked for by
        ``needs_attention``."""

    def attach(self, model: nn.Module, *, graph: bool | None = None, compile: bool = False) -> Kept:
        """Make ``model`` keep and read only what the policy allows, until the returned :class:`Kept` is left or undone.

        Args:
            graph: decode through a captured CUDA graph where shapes stay fixed. By default wherever entries are
                dropped; ``True`` also where all are kept (sums are then in another order than the model's own),
                ``False`` nowhere. Without CUDA it has no effect.
            compile: fuse the model's small operations (torch.compile, block by block) before a step is captured:
                some seconds once for each batch size, then a faster step.

        Raises:
            UnsupportedModelError: the model is no causal decoder that Vestige knows, or lacks what the policy needs.
            PatchConflictError: another policy is attached.
        """
        return Kept(model, self, graph=graph, compile=compile)


class Ranking(CachePolicy):
    """A policy that drops entries for good: what the layers of the cache ask it.

    Attributes:
        sinks: first tokens of the text that are always kept.
        lag: decoding steps from one drop to the next.
        by_age: whether the entry to give up while decoding is simply the oldest that is no sink.
        needs_lost: whether :meth:`lose` is to be called.
        comparable: whether scores of different heads may be compared, and not only those of one head.
    """

    sinks = 0
    lag = 1
    by_age: ClassVar[bool] = False
    needs_lost: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    @property
    def ranking(self) -> Ranking:
        return self

    def score(self, entries: KeptLayer) -> Tensor:
        """Rank of every entry, ``(batch, kv_heads, slots)`` floating point; the highest are kept."""
        raise NotImplementedError

    def budget_tokens(self, seen: int) -> int:
        """Entries allowed per head after ``seen`` tokens."""
        raise NotImplementedError

    def recent_tokens(self, allowed: int) -> int:
        """Last tokens that are kept in any case, of ``allowed`` entries."""
        return 0

    def acts(self, decoding: bool) -> bool:
        """Whether entries are dropped in a pass of this kind."""
        return True

    def layer_budgets(self, budgets: list[int], real: list[int], layer: int, layers: int) -> list[int]:
        """Entries per head that each row may hold in one of ``layers`` layers, after ``real`` tokens per row, where
        ``budgets`` is the mean of the layers."""
        return budgets

    def head_budgets(self, real: list[int], layer: int) -> list[list[int]] | None:
        """Entries that each row's heads may hold in a layer after ``real`` tokens per row, where a rule makes them
        unequal; ``None`` where they are equal, or shared out by rank."""
        return None

    def share_out(self, rank: Tensor, budgets: list[int]) -> Tensor | None:
        """Entries for each head, ``(batch, kv_heads)``, of ``budgets[row]`` per head together; ``None`` for equal ones.

        ``rank`` is ``(batch, kv_heads, slots)``: scores, infinite (or the largest number) for entries that are kept
        in any case, minus infinity for empty slots.
        """
        return None

    def lose(self, entries: KeptLayer, keys: Tensor, values: Tensor, gone: Tensor) -> None:
        """Take note of entries, ``(batch, kv_heads, n, dim)``, of which a layer with unequal heads drops those that are
        ``gone (batch, kv_heads, n)``."""

    def stand_in(self, entries: KeptLayer) -> StandIn | None:
        """What stands for the entries that a layer has dropped, if anything does."""
        return None


class Evict(Ranking):
    """A policy that drops entries for good, down to a budget that is the same for all heads."""

    budget: int | float = param(
        1024, "entries kept per head: tokens (int), or a share of the tokens seen (float)", gt=0
    )
    sinks: int = param(0, "first tokens of the text that are always kept", ge=0)
    recent: int | float = param(0.5, "last tokens that are always kept: tokens (int), or a share of the budget", ge=0)
    when: Literal["both", "prefill", "decoding"] = param("both", "drop after prompt chunks, while decoding, or both")

    lag: int = param(1, "decoding steps from one drop to the next; up to lag - 1 entries too many are held", ge=1)

    # By what the next entry to give up is found while decoding, if a kernel can: a graph needs it.
    decode_rank: ClassVar[Literal["mass", "position", "none"]] = "none"

    def check(self) -> None:
        if isinstance(self.budget, float) and self.budget > 1:
            raise SpecError(
                f"{self.name}: parameter 'budget' is {self.budget!r}; a share is at most 1.0 (tokens are an int)"
            )
        if isinstance(self.recent, float) and self.recent > 1:
            raise SpecError(
                f"{self.name}: parameter 'recent' is {self.recent!r}; a share is at most 1.0 (tokens are an int)"
            )
        if isinstance(self.budget, int):
            fixed = self.recent if isinstance(self.recent, int) else 0
            if self.budget < self.sinks + fixed:
                raise SpecError(
                    f"{self.name}: parameter 'budget' is {self.budget}; "
                    f"it must hold sinks + recent = {self.sinks + fixed}"
                )

    @property
    def plain(self) -> bool:
        looks = self.needs_attention or type(self).observe is not CachePolicy.observe
        return self.budget == 1.0 and not looks

    def with_budget(self, budget: int | float) -> Evict:
        return self.replace(budget=budget)

    def lossless(self, tokens: int) -> Evict:
        return self if self.budget == 1.0 else self.replace(budget=tokens)

    def budget_tokens(self, seen: int) -> int:
        return budget_tokens(self.budget, seen)

    def recent_tokens(self, allowed: int) -> int:
        wanted = self.recent if isinstance(self.recent, int) else math.floor(self.recent * allowed)
        return max(0, min(wanted, allowed - self.sinks))

    def acts(self, decoding: bool) -> bool:
        return self.budget != 1.0 and self.when in ("both", "decoding" if decoding else "prefill")


class AttentionMass(Evict):
    """A policy that ranks entries by the attention they have received, each query's weighted by its age."""

    needs_attention: ClassVar[bool] = True
    decode_rank: ClassVar[Literal["mass", "position", "none"]] = "mass"

    def query_weights(self, age: Tensor) -> Tensor:
        """Weight of a query's attention in the mass of the entries, given the number of queries after it."""
        raise NotImplementedError

    def carry(self, fresh: int) -> float:
        """Factor on the mass gathered before, when ``fresh`` queries have come since."""
        raise NotImplementedError

    def horizon(self) -> int | None:
        """How many of the latest queries carry any weight; ``None`` for all."""
        return None

    def score(self, entries: KeptLayer) -> Tensor:
        return entries.state["mass"]

    def observe(self, entries: KeptLayer, look: Look, step: Step) -> None:
        horizon = self.horizon() if step.ends_real else None
        late = slice(-min(horizon or step.count, step.count), None)
        received = look.mass(entries, self.query_weights(step.age[..., late]), step)
        mass = entries.state.get("mass")
        if mass is not None:
            received += mass * per_row([self.carry(fresh) for fresh in step.fresh], mass.device)
        entries.state["mass"] = received

    def receive(self, entries: KeptLayer, share: Tensor, step: Step) -> None:
        received = share.sum(dim=2)
        mass = entries.state.get("mass")
        entries.state["mass"] = received if mass is None else mass.mul_(self.carry(1)).add_(received)


class Kept:
    """A policy attached to a model: what the model's cache holds, until undone.

    Made by :meth:`CachePolicy.attach`; a context manager. The model makes its own kept cache whenever it would
    have made a cache; :meth:`new_cache` makes one to pass as ``past_key_values``.
    """

    def __init__(
        self, model: nn.Module, policy: CachePolicy, *, graph: bool | None = None, compile: bool = False
    ) -> None:
        anatomy = Anatomy.of(model)
        if not anatomy.causal:
            raise UnsupportedModelError(
                f"{policy.name} needs a causal decoder with a cache; {anatomy.architecture} is none"
            )
        policy = policy.on(anatomy)
        policy.check_model(anatomy)
        self.policy, self.anatomy = policy, anatomy
        self._rotary = Rotary.of(anatomy) if policy.needs_rotary else None
        self.cache: KeptCache | None = None
        self._running: KeptCache | None = None
        self._lasting = True  # whether the running cache outlives its pass
        self._again = 0  # tokens that are read once more before those that come
        self._watchers: list[Callable[..., None]] = []
        self._own = _OwnAttention(anatomy)
        owner = getattr(policy, "name", type(policy).__name__)  # Together has no name of its own
        self._patch = Patch(model, owner, claims={"kv-cache"})
        self._patch.attention(ATTENTION, _attention, _mask, part=anatomy.base)
        self._patch.hook(anatomy.base, self._before, kind="forward_pre", with_kwargs=True)
        self._patch.hook(anatomy.base, self._after, kind="forward")
        for layer in anatomy.layers:
            _attached[layer.attention] = self
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
            and type(policy).present is CachePolicy.present
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


class _OwnAttention:
    """The attention and mask functions that the model used before."""

    def __init__(self, anatomy: Anatomy) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = anatomy.config._attn_implementation or "eager"
        self._function = ALL_ATTENTION_FUNCTIONS.get(name)
        self.mask = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def function(self, module: nn.Module) -> Callable[..., Any]:
        """Registered ones by name; the eager one stands in the file that defines the attention module."""
        if self._function is not None:
            return self._function
        return sys.modules[type(module).__module__].eager_attention_forward
