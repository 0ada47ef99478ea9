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

from vestige.context.evict.full import Full
from vestige.context.evict.streaming_llm import StreamingLLM
from vestige.context.plan.windows import HeadWindows
from vestige.context.policy import CachePolicy
from vestige.core.anatomy import Anatomy
from vestige.evidence.certify.caching import CacheCase, feed
from vestige.evidence.certify.suite import NotApplicable, Seen, expect
from vestige.evidence.data.text import passages

__all__ = [
    "BUDGET",
    "READ",
    "Reading",
    "beats_a_window",
    "copying_loss",
    "divergence",
    "excess_loss_while_rolling",
    "holds_more_attention",
    "planned",
    "read_on",
    "reads_better_than_streaming",
]

READ, GO_ON = 256, 32  # tokens read before the cut, and after it
BUDGET = 40  # entries that the cut leaves
COPIED, LEAD = slice(64, 96), 4  # tokens of a passage that come again, and those of them by which one knows it


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
    return _read_on(case.lm, policy.with_budget(1.0), budget, case.seeds)


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
            on_kept = received.gather(2, held[layer].clamp_min(0)) * (held[layer] >= 0)
            shares.append((on_kept.sum(dim=2) / received.sum(dim=2)).mean(dim=1))

        watch = kept.watch(look)
        full = model(ahead, past_key_values=whole).logits.float().log_softmax(dim=-1)
        watch.remove()
        after = model(ahead, past_key_values=cut).logits.float().log_softmax(dim=-1)
        divergence = kl_div(after, full, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)
    ages = torch.stack([_mean_age(positions) for positions in held])
    return Reading(torch.stack(shares).mean(dim=0), divergence, ages.mean(dim=0))


def holds_more_attention(case: CacheCase, policy: CachePolicy) -> Seen:
    """Expect entries kept to receive more of later tokens' attention than as many sinks and recent ones."""
    mine, streaming = read_on(case, policy), read_on(case, StreamingLLM())
    seen = {"share of attention kept": mine.share.tolist(), "by sinks and window": streaming.share.tolist()}
    expect(bool((mine.share > streaming.share).all()), f"sinks and window hold as much: {seen}")
    return seen


def beats_a_window(case: CacheCase, policy: CachePolicy) -> Seen:
    """Expect predictions nearer to those with the whole cache than with as many recent entries."""
    mine, window = read_on(case, policy), read_on(case, StreamingLLM(sinks=0))
    seen = {"divergence": mine.divergence.tolist(), "of a plain window": window.divergence.tolist()}
    expect(bool((mine.divergence < window.divergence).all()), f"a window does as well: {seen}")
    return seen


def reads_better_than_streaming(case: CacheCase) -> Seen:
    """Expect a policy that reads few of its entries to stay nearer to the model alone, token by token, than one that
    keeps as many as sinks and a window, for each seed."""
    mine = divergence(case, case.on_lm(budget=BUDGET), singly=True)
    streaming = divergence(case, StreamingLLM(budget=BUDGET), singly=True)
    seen = {"divergence": mine.tolist(), "of sinks and window": streaming.tolist()}
    expect(bool((mine < streaming).all()), f"sinks and window do as well: {seen}")
    return seen


def _mean_age(positions: Tensor) -> Tensor:
    """``(batch,)`` mean over the entries held, of heads that may hold unequal numbers of them."""
    there = positions >= 0
    return ((READ - 1 - positions) * there).sum(dim=(1, 2)) / there.sum(dim=(1, 2)).double()


def divergence(case: CacheCase, policy: CachePolicy, *, singly: bool = False) -> Tensor:
    """``(seeds,)`` how far predictions are from those of the model alone, after a passage read under a policy.

    Kullback-Leibler, in nats per token, over the tokens that follow: a chunk, or fed ``singly`` as in generation.
    """
    mine = _predictions(case.lm, policy, singly, case.seeds)
    alone = _predictions(case.lm, Full(), False, case.seeds)
    return kl_div(mine, alone, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)


@functools.lru_cache(maxsize=16)
@torch.no_grad()
def _predictions(lm: tuple[Any, Any], policy: CachePolicy, singly: bool, seeds: tuple[int, ...]) -> Tensor:
    """``(seeds, tokens, vocabulary)`` logarithms of the probabilities of what comes after each token past the first
    :data:`READ`."""
    model, tokenizer = lm
    tokens = passages(tokenizer, READ + GO_ON, seeds).to(model.device)
    after = [1] * GO_ON if singly else [GO_ON]
    with policy.attach(model) as kept:
        run = feed(model, tokens, [READ, *after], kept.new_cache(), kept=False)
    return torch.cat(run.logits[1:], dim=1).float().log_softmax(dim=-1)


@torch.no_grad()
def copying_loss(case: CacheCase, policy: CachePolicy) -> Tensor:
    """``(seeds,)`` loss in nats per token of a stretch that comes again, far back in a passage read under a policy."""
    model, tokenizer = case.lm
    tokens = passages(tokenizer, READ, case.seeds).to(model.device)
    again = tokens[:, COPIED]
    with policy.attach(model) as kept:
        chunks = [READ, again.shape[1]]
        run = feed(model, torch.cat([tokens, again], dim=1), chunks, kept.new_cache(), kept=False)
    return loss(run.logits[1][:, LEAD - 1 :], again[:, LEAD - 1 :])


def planned(case: CacheCase, **changes: Any) -> Any:
    """A plan of heads with the tables that are known for the language model, and changes to other parameters.

    Raises:
        NotApplicable: none are known.
    """
    anatomy = Anatomy.of(case.lm[0])
    policy = case.method
    assert isinstance(policy, HeadWindows)
    if not policy.fitted and policy.known(anatomy, policy.variant) is None:
        raise NotApplicable(f"no plan of {policy.name} is known for {case.model_name}: fit one, and save it")
    return policy.on(anatomy).replace(**changes)


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
