"""How well a language model reads on after a cache policy has cut its cache: what claims of cache policies measure.

The model reads passages of natural text, one per seed, up to :data:`READ` tokens, with everything ranked and nothing
dropped; the cache is cut; it goes on with the text. What follows is not known when the cache is cut.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from vestige.context.policy import CachePolicy
from vestige.evidence.certify.caching import CacheCase, feed
from vestige.evidence.data.text import passages

__all__ = ["BUDGET", "READ", "Reading", "excess_loss_while_rolling", "read_on"]

READ, GO_ON = 256, 32  # tokens read before the cut, and after it
BUDGET = 40  # entries that the cut leaves


@dataclass(frozen=True)
class Reading:
    """What was seen after a cut, for each seed.

    Attributes:
        share: of the attention that the tokens after the cut pay to those before it, in the model with its whole cache,
            the share that falls on the entries kept; mean over layers and heads.
        divergence: of the predictions after the cut from those with the whole cache: Kullback-Leibler, in nats per
            token. A difference of losses would need many more tokens to tell as much.
        age: mean over the entries kept of the tokens that have come since.
    """

    share: Tensor
    divergence: Tensor
    age: Tensor


def read_on(case: CacheCase, policy: CachePolicy, budget: int = BUDGET) -> Reading:
    """Read, cut to a budget in tokens, and read on."""
    return _read_on(case.lm, policy.replace(budget=1.0), budget, case.seeds)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _read_on(lm: tuple[Any, Any], policy: CachePolicy, budget: int, seeds: tuple[int, ...]) -> Reading:
    model, tokenizer = lm
    tokens = passages(tokenizer, READ + GO_ON, seeds).to(model.device)
    ahead = tokens[:, READ:]
    shares: list[Tensor] = []
    with policy.attach(model) as kept:
        whole = kept.new_cache()
        model(tokens[:, :READ], past_key_values=whole, logits_to_keep=1)
        cut = whole.cut(budget)
        held = [cut.positions(layer) for layer in range(len(cut.layers))]

        def look(layer: int, query: Tensor, keys: Tensor, positions: Tensor | None, scaling: float) -> None:
            received = _attention_to_the_past(query, keys, scaling)
            shares.append((received.gather(2, held[layer]).sum(dim=2) / received.sum(dim=2)).mean(dim=1))

        watch = kept.watch(look)
        full = model(ahead, past_key_values=whole).logits.float().log_softmax(dim=-1)
        watch.remove()
        after = model(ahead, past_key_values=cut).logits.float().log_softmax(dim=-1)
        divergence = kl_div(after, full, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)
    ages = torch.stack([(READ - 1 - positions).double().mean(dim=(1, 2)) for positions in held])
    return Reading(torch.stack(shares).mean(dim=0), divergence, ages.mean(dim=0))


def _attention_to_the_past(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """``(batch, kv_heads, READ)`` attention that the keys before a chunk get from its queries, in the plain order."""
    count, entries = query.shape[2], keys.shape[2]
    group = query.shape[1] // keys.shape[1]
    logits = (query @ keys.repeat_interleave(group, dim=1).transpose(-1, -2) * scaling).float()
    causal = torch.ones(count, entries, dtype=torch.bool, device=query.device).tril(entries - count)
    past = logits.masked_fill(~causal, float("-inf")).softmax(dim=-1)[..., : entries - count]
    return past.unflatten(1, (-1, group)).sum(dim=(2, 3))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """``(batch,)`` mean loss in nats of predicting each token from those before it."""
    each = cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view(len(tokens), -1).mean(dim=1)


@torch.no_grad()
def excess_loss_while_rolling(case: CacheCase, policy: CachePolicy, chunk: int = 64, single: int = 8) -> Tensor:
    """``(seeds,)`` loss in nats, above the plain model's, of reading with a cache that is cut as it goes.

    The text comes in chunks, and at the end token by token; only what comes after the first chunk counts, for only
    then is something missing.
    """
    model, tokenizer = case.lm
    tokens = passages(tokenizer, READ + single, case.seeds).to(model.device)
    chunks = [chunk] * (READ // chunk) + [1] * single
    with policy.attach(model) as kept:
        logits = torch.cat(feed(model, tokens, chunks, kept.new_cache(), kept=False).logits, dim=1)
    return loss(logits[:, chunk:], tokens[:, chunk:]) - _plain_loss(case.lm, READ + single, chunk, case.seeds)


@functools.lru_cache(maxsize=4)
@torch.no_grad()
def _plain_loss(lm: tuple[Any, Any], length: int, first: int, seeds: tuple[int, ...]) -> Tensor:
    """``(seeds,)`` loss of the model alone over the tokens of a passage from ``first`` on."""
    model, tokenizer = lm
    tokens = passages(tokenizer, length, seeds).to(model.device)
    return loss(model(tokens, use_cache=False).logits[:, first:], tokens[:, first:])
