"""What a cache policy is, and how it is attached to a model.

A policy that evicts is three things, kept apart: a *score* that ranks the entries of a head (the
subclass), a *budget* (tokens, or a share of the tokens seen), and a *schedule* (after each chunk of the
prompt, while decoding, or both). Attached to a model, it makes the model's caches hold only what it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from vestige.context.attention import Look
from vestige.context.cache import KeptCache, budget_tokens
from vestige.context.layer import KeptLayer, Step, per_row
from vestige.context.ragged_attention import StandIn
from vestige.core.anatomy import Anatomy
from vestige.core.method import Method, param
from vestige.errors import SpecError

if TYPE_CHECKING:
    from vestige.context.kept import Kept
    from vestige.context.slots import TurnedKeys

__all__ = ["AttentionMass", "CachePolicy", "Evict", "Ranking", "check_shares"]


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

    def turned(self, entries: KeptLayer) -> TurnedKeys | None:
        """What :meth:`present` comes to in a step over fixed slots, where it turns keys by the tokens missing; asked
        for once every row has seen its sinks, before the step's token is entered."""
        return None

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
        from vestige.context.kept import Kept

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
        check_shares(self, "budget", "recent")
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


def check_shares(policy: CachePolicy, *names: str) -> None:
    """Raise :class:`SpecError` for a parameter, in tokens or as a share, that is a share of more than one."""
    for name in names:
        value = getattr(policy, name)
        if isinstance(value, float) and value > 1:
            raise SpecError(
                f"{policy.name}: parameter {name!r} is {value!r}; a share is at most 1.0 (tokens are an int)"
            )
