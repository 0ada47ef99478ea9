"""A cache that holds only what a policy keeps.

A :class:`KeptCache` is a transformers ``Cache``; its layers store the kept keys and values, the
original position of each entry, and whatever per-entry state the policy needs to rank them.
Everything that a layer holds is gathered together, so bytes reported are bytes held.

What is true of all layers in one forward pass (how many tokens come in, which are padding, how many
entries each row may hold afterwards) is worked out once, in a :class:`Step`.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from vestige.context.layer import EMPTY, Step
from vestige.errors import InputError

if TYPE_CHECKING:
    from vestige.context.policy import CachePolicy
    from vestige.context.rotary import Rotary
    from vestige.context.slots import SlotStep

__all__ = ["KeptCache", "budget_tokens"]


class KeptCache(Cache):
    """A transformers cache whose layers hold only what ``policy`` keeps.

    Made by :meth:`vestige.context.kept.Kept.new_cache`; pass it as ``past_key_values`` or let the attached
    model make its own. ``get_seq_length()`` counts the tokens seen, so position ids stay those of the text.

    Args:
        rotary: the model's turns by position, for a policy that asks for them.
    """

    layers: list[Any]  # of KeptLayer, or of what the policy stores its entries in

    def __init__(self, policy: CachePolicy, layers: int, rotary: Rotary | None = None) -> None:
        self.policy = policy
        self.rotary = rotary
        self.frozen = False
        self.step: Step | None = None
        self.slots_step: SlotStep | None = None  # set on the stand-in through which a graph is captured
        self.real: list[int] = []
        self.turn = 0
        self.padded = False
        super().__init__(layers=[policy.new_layer(self, index) for index in range(layers)])

    def begin(self, batch: int, count: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Work out, once for all layers, what the coming forward pass of ``count`` columns means.

        Raises:
            InputError: a mask that is not 2-D, or not as long as the columns seen and coming.
        """
        start = self.get_seq_length()
        self.real = self.real or [0] * batch
        fresh, positions, age, ends_real = [count] * batch, None, None, True
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise InputError(f"the cache needs a 2-D attention mask (batch, tokens), not {attention_mask.dim()}-D")
            if attention_mask.shape[1] not in (count, start + count):
                raise InputError(
                    f"the attention mask has {attention_mask.shape[1]} columns; "
                    f"{start} tokens were seen and {count} come"
                )
            mask = attention_mask[:, -count:].to(device=device, dtype=torch.bool)
            if count > 1 and not bool(mask.all()):
                self.padded = True
                fresh, ends_real = mask.sum(dim=1).tolist(), bool(mask[:, -1].all())
            if self.padded:
                before = torch.tensor(self.real, device=device)[:, None]
                positions = torch.where(mask, before + mask.cumsum(dim=1) - 1, EMPTY)
                age = mask.flip(1).cumsum(dim=1).flip(1) - mask.long()
                age = torch.where(mask, age, torch.iinfo(torch.int32).max)
        if age is None:
            age = torch.arange(count - 1, -1, -1, device=device)
        if self.padded and positions is None:
            positions = torch.tensor(self.real, device=device)[:, None] + torch.arange(count, device=device)
        self.real = [seen + new for seen, new in zip(self.real, fresh, strict=True)]
        decoding = count == 1 and start > 0
        self.turn = self.turn + 1 if decoding else 0
        allowed, ranking = None, self.policy.ranking
        if ranking is not None and not self.frozen and ranking.acts(decoding) and self.turn % ranking.lag == 0:
            allowed = [ranking.budget_tokens(real) for real in self.real]
        self.step = Step(count, start, positions, age, fresh, list(self.real), allowed, self.turn, ends_real)

    @property
    def nbytes(self) -> int:
        """Bytes of storage held by all layers."""
        return sum(self.nbytes_by_part().values())

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes held, as ``keys``, ``values``, ``positions`` and ``state`` (what ranks the entries)."""
        parts = {"keys": 0, "values": 0, "positions": 0, "state": 0}
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                part = name.partition(" ")[0]
                parts[part if part in parts else "state"] += tensor.untyped_storage().nbytes()
        return parts

    def positions(self, layer: int) -> Int[Tensor, "batch kv slots"]:
        """Original position of every entry held in a layer, per head; -1 marks an empty slot."""
        held = self.layers[layer]
        if not held.is_initialized:
            raise InputError("the cache is empty: run the model first")
        return held._positions(held.slots).long()

    def fork(self) -> KeptCache:
        """An independent copy: what either does from here on leaves the other alone."""
        twin = self._twin()
        for index, layer in enumerate(self.layers):
            other = copy.copy(layer)
            other.cache = twin
            other._rewrite(lambda tensor: tensor.clone())
            twin.layers[index] = other
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptCache:
        return self.fork()

    def cut(self, budget: int | float | None = None) -> KeptCache:
        """A copy that holds ``budget`` entries per head, ranked as the policy ranks them, and drops no more after.

        One prefill under a budget of 1.0 (nothing dropped, everything ranked) so serves every budget. Without one the
        copy holds what the policy itself leaves, as of a plan by windows.
        """
        twin = self._twin()
        twin.policy, twin.frozen = self.policy if budget is None else self.policy.with_budget(budget), True
        assert twin.policy.ranking is not None
        budgets = [twin.policy.ranking.budget_tokens(real) for real in twin.real]
        for index, layer in enumerate(self.layers):
            other = copy.copy(layer)
            other.cache, other.state, other.aside = twin, dict(layer.state), dict(layer.aside)
            twin.layers[index] = other
            other.keep(budgets)
            cut = twin.layers[index]  # a ragged layer may have taken the place
            if cut.shares(layer):
                cut._rewrite(lambda tensor: tensor.clone())
            else:
                cut.aside = {name: tensor.clone() for name, tensor in layer.aside.items()}
        return twin

    def _twin(self) -> KeptCache:
        """A copy whose layers are yet those of this one."""
        twin = copy.copy(self)
        twin.step, twin.real, twin.layers = None, list(self.real), list(self.layers)
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.real = [self.real[i] for i in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.real = [real for real in self.real for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.real = [self.real[i] for i in indices.tolist()]

    def reset(self) -> None:
        self.layers = [self.policy.new_layer(self, index) for index in range(len(self.layers))]
        self.step, self.real, self.turn, self.padded = None, [], 0, False

    def rewind(self, count: int) -> None:
        """Forget the last ``count`` tokens, real in every row, of a cache that drops nothing."""
        for layer in self.layers:
            layer.rewind(count)
        self.real = [real - count for real in self.real]

    def crop(self, max_length: int) -> None:
        before = self.get_seq_length()
        super().crop(max_length)
        self.real = [real - (before - self.get_seq_length()) for real in self.real]


def budget_tokens(budget: int | float, seen: int) -> int:
    """Entries that a budget allows after ``seen`` tokens: itself if in tokens, a rounded-up share if a fraction."""
    return budget if isinstance(budget, int) else max(1, math.ceil(budget * seen))
