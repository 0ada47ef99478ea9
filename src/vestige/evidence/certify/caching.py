"""What the checks of cache policies share: running a model in chunks, with the reference in its attention, and
looking at what a model or a cache holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from vestige.context.plan.windows import HeadWindows
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.core.patch import Patch
from vestige.errors import SpecError
from vestige.evidence.certify.suite import Case, NotApplicable
from vestige.evidence.references import asked_of, reference_of
from vestige.models.tiny import tiny_model

__all__ = [
    "BUDGET",
    "CacheCase",
    "Run",
    "differences",
    "feed",
    "held_bytes",
    "learn",
    "reference_run",
    "snapshot",
    "sorted_positions",
]

BUDGET, SINKS, RECENT = 12, 2, 3  # what the small models' short prompts are cut to


@dataclass
class CacheCase(Case):
    """A cache policy, and the small models it is tried on.

    The policy under certification may have a budget of thousands of tokens; on prompts of a few dozen it would never
    drop anything. :attr:`fitted` has a budget that binds there, what the reference module's ``SMALL`` says of other
    sizes, and every other hyper-parameter as given.
    """

    method: CachePolicy

    def variant(self, **changes: Any) -> CachePolicy:
        """The fitted policy with further changes, of the parameters that it has.

        Raises:
            NotApplicable: the policy cannot be changed so.
        """
        try:
            return _changed(self.fitted, changes)
        except SpecError as error:
            raise NotApplicable(f"no such form of the policy: {error}") from None

    @functools.cached_property
    def fitted(self) -> CachePolicy:
        """The policy with a budget that binds on short prompts, where it has one that can be set."""
        given: dict[str, Any] = {name: getattr(self.method, name, None) for name in self.method.parameters()}
        changes: dict[str, Any] = {"budget": BUDGET} if "budget" in given else {}
        changes |= getattr(reference_of(self.method.name), "SMALL", {})
        if type(given.get("sinks")) is int and given["sinks"] > SINKS:
            changes["sinks"] = SINKS
        if type(given.get("recent")) is int and given["recent"] > RECENT:
            changes["recent"] = RECENT
        changes |= {name: CacheCase(inner).fitted for name, inner in given.items() if isinstance(inner, CachePolicy)}
        try:
            return self.method.replace(**changes)
        except SpecError:
            return self.method

    def roomy(self, tokens: int) -> CachePolicy:
        """The fitted policy in a form that loses nothing over that many tokens.

        Raises:
            NotApplicable: it has no such form.
        """
        policy = self.fitted.lossless(tokens)
        if policy is None:
            raise NotApplicable("the policy has no form that loses nothing")
        return policy

    @property
    def bounded(self) -> bool:
        """Whether the fitted policy drops entries at all."""
        return _budget(self.fitted) == BUDGET

    def require_bounded(self) -> None:
        """Leave a check out for a policy that keeps everything."""
        if not self.bounded:
            raise NotApplicable("the policy keeps every entry")

    def tiny(self, architecture: str, dtype: torch.dtype = torch.float64) -> Any:
        """A small random model, shared: checks undo what they do to it. What the policy must know of it is learnt."""
        model = tiny_model(architecture, dtype, self.device)
        if isinstance(self.fitted, HeadWindows) and Anatomy.of(model).causal:
            learn(self.fitted, tiny_model(architecture, torch.float32, self.device))
        return model

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """``(batch, length)`` random token ids, none of them special."""
        drawn = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device)

    @functools.cached_property
    def lm(self) -> tuple[Any, Any]:
        """The language model and tokenizer that behaviour is looked at on."""
        if isinstance(self.model, tuple):
            return self.model
        return _load(self.model or "smollm2", self.device)

    @property
    def model_name(self) -> str:
        return "smollm2" if self.model is None else super().model_name

    def on_lm(self, **changes: Any) -> CachePolicy:
        """The policy as given, with changes, for a language model."""
        return self.method.replace(**changes)


def learn(policy: HeadWindows, model: nn.Module) -> HeadWindows:
    """What a policy has to know of a small model, learnt as the reference module's ``small_fit`` says."""
    known = policy.known(Anatomy.of(model), policy.variant)
    if known is not None:
        return known
    given = {
        name: value for name in policy.parameters() if name not in policy.tables and (value := getattr(policy, name))
    }
    how: dict[str, Any] = getattr(reference_of(policy.name), "small_fit", dict)()
    learns: Any = type(policy)
    return learns.fit(model, parameters=given, **how).remember()


def _changed(policy: CachePolicy, changes: dict[str, Any]) -> CachePolicy:
    """A policy with changes to those of the parameters that it, or a policy inside it, has."""
    given = policy.parameters()
    known = {name: value for name, value in changes.items() if name in given}
    inner = {name: value for name in given if isinstance(value := getattr(policy, name), CachePolicy)}
    return policy.replace(**{name: _changed(value, changes) for name, value in inner.items()}, **known)


def _budget(policy: CachePolicy) -> int | float | None:
    """The budget of a policy, or of the one inside it."""
    inner = (getattr(policy, name) for name in policy.parameters())
    return getattr(policy, "budget", None) or next((_budget(p) for p in inner if isinstance(p, CachePolicy)), None)


@functools.lru_cache(maxsize=2)
def _load(name: str, device: str) -> tuple[Any, Any]:
    from vestige.models.hub import load

    return load(name, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Run:
    """What came of feeding a model: ``logits[chunk]`` is ``(batch, count, vocabulary)``; ``kept[chunk][layer]`` what
    each kv head held after it, as ``(batch, kv_heads)`` nested tuples of rising positions."""

    logits: tuple[Tensor, ...]
    kept: tuple[tuple[Any, ...], ...]

    @property
    def last(self) -> Tensor:
        """``(chunks, batch, vocabulary)`` logits of each chunk's last token."""
        return torch.stack([logits[:, -1] for logits in self.logits])

    def tail(self, chunks: int) -> Run:
        """The last chunks only."""
        return replace(self, logits=self.logits[-chunks:], kept=self.kept[-chunks:])


@torch.no_grad()
def feed(
    model: nn.Module, tokens: Tensor, chunks: Sequence[int], cache: Any, mask: Tensor | None = None, kept: bool = True
) -> Run:
    """Feed tokens to a model chunk by chunk.

    Args:
        tokens: ``(batch, sum(chunks))``.
        cache: what to pass as ``past_key_values``; it may hold a past already.
        mask: ``(batch, past + sum(chunks))``, zero for padding on the left.
        kept: whether to write down what is held after each chunk.
    """
    past = cache.get_seq_length() if cache is not None else 0
    logits, held = [], []
    start = 0
    for count in chunks:
        extra: dict[str, Any] = {}
        if mask is not None:
            so_far = mask[:, : past + start + count]
            extra = {"attention_mask": so_far, "position_ids": (so_far.cumsum(1) - 1).clamp_min(0)[:, -count:]}
        step = tokens[:, start : start + count]
        logits.append(model(step, past_key_values=cache, use_cache=cache is not None, **extra).logits)
        if kept and hasattr(cache, "positions"):
            held.append(tuple(sorted_positions(cache, layer) for layer in range(len(cache.layers))))
        start += count
    return Run(tuple(logits), tuple(held))


def sorted_positions(cache: Any, layer: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """What each row's kv heads hold in a layer, in rising order, without empty slots."""
    return tuple(
        tuple(tuple(sorted(p for p in head if p >= 0)) for head in row) for row in cache.positions(layer).tolist()
    )


@torch.no_grad()
def reference_run(
    model: nn.Module, tokens: Tensor, chunks: Sequence[int], simulate: Callable[..., Any], policy: CachePolicy
) -> Run:
    """Run a model whose attention layers are a reference: the whole past is held and the reference says what of it
    each head sees. Nothing of the engine under test takes part.

    Args:
        tokens: ``(1, sum(chunks))``.
    """
    queries: dict[int, list[Tensor]] = {}
    kept: list[dict[int, Any]] = [{} for _ in chunks]
    policy = policy.on(Anatomy.of(model))
    parameters = {name: getattr(policy, name) for name in policy.parameters()}
    rotary = getattr(Anatomy.of(model).base, "rotary_emb", None)
    frequencies = None if rotary is None else rotary.inv_freq
    traces: dict[int, Any] = {}

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        past = queries.setdefault(module.layer_idx, [])  # type: ignore[arg-type]
        past.append(query[0].cpu())
        index: int = module.layer_idx  # type: ignore[assignment]
        place = {"layer": index, "layers": model.config.num_hidden_layers, "below": traces}
        trace = simulate(
            torch.cat(past, dim=1),
            key[0].cpu(),
            value[0].cpu(),
            chunks[: len(past)],
            scaling=scaling,
            window=sliding_window,
            frequencies=frequencies,
            **parameters,
            **asked_of(simulate, place),
        )
        traces[index] = trace
        kept[len(past) - 1][module.layer_idx] = (trace.kept[-1],)  # type: ignore[index]
        output = trace.output[:, -query.shape[2] :].transpose(0, 1)[None]
        return output.to(query).contiguous(), None

    with Patch(model, "reference") as patch:
        patch.attention("vestige-reference", attention)
        run = feed(model, tokens, chunks, DynamicCache())
    return replace(run, kept=tuple(tuple(step[layer] for layer in sorted(step)) for step in kept))


def held_tensors(thing: Any) -> dict[int, Tensor]:
    """Every tensor that can be reached from an object, by the address of its storage.

    Models are not entered, nor Python's own classes and functions.
    """
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    ahead = [thing]
    while ahead:
        current = ahead.pop()
        if id(current) in seen or isinstance(current, nn.Module | type) or callable(current):
            continue
        seen.add(id(current))
        if isinstance(current, Tensor):
            if current.untyped_storage().nbytes():
                found[current.untyped_storage().data_ptr()] = current
        elif isinstance(current, dict):
            ahead += list(current.values())
        elif isinstance(current, list | tuple | set | frozenset):
            ahead += list(current)
        elif hasattr(current, "__dict__"):
            ahead += list(vars(current).values())
    return found


def held_bytes(thing: Any) -> int:
    """Bytes of storage of every tensor that can be reached from an object."""
    return sum(tensor.untyped_storage().nbytes() for tensor in held_tensors(thing).values())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that an attachment could leave changed, and what transformers has registered."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "methods": {name: module.forward.__func__ is type(module).forward for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in _HOOKS] for name, module in model.named_modules()},
        "parameters": {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version) for name, b in model.named_buffers()},
        "config": model.config.to_dict() | dict(_private(model.config)),
        "generation config": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "training": model.training,
        "attention functions": sorted(AttentionInterface().keys()),
        "mask functions": sorted(AttentionMaskInterface().keys()),
        "patches": len(Patch.active(model)),
    }


def _private(config: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(config).items() if name.startswith("_attn"))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two snapshots differ."""
    return [name for name in before if before[name] != after[name]]
