"""Claims of the key norm: short keys draw the attention, so that they can be kept without looking at any query."""

from __future__ import annotations

import torch
from torch import Tensor

from vestige.context.evict.full import Full
from vestige.context.evict.knorm import KNorm
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import READ, read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.data.text import passages
from vestige.layers.ops.attention_mass import attention_mass


class _Longest(KNorm):
    """The opposite."""

    def score(self, entries):  # type: ignore[no-untyped-def]
        return -super().score(entries)


@claim(slow=True)
@torch.no_grad()
def short_keys_draw_attention(case: CacheCase) -> Seen:
    """In most layers norm and attention received are ranked the other way round, if only a little."""
    model, tokenizer = case.lm
    tokens = passages(tokenizer, READ, case.seeds).to(model.device)
    found: list[Tensor] = []

    def look(layer: int, query: Tensor, keys: Tensor, positions: Tensor | None, scaling: float) -> None:
        count = query.shape[2]
        received = attention_mass(query, keys, torch.ones(count, device=query.device), scaling=scaling)
        received = received / torch.arange(count, 0, -1, device=query.device)  # mean over the queries that see it
        found.append(_rank_correlation(keys.float().norm(dim=-1), received)[:, :, None])

    with Full().attach(model) as kept:
        kept.watch(look)
        model(tokens, use_cache=True, logits_to_keep=1)
    by_layer = torch.cat(found, dim=2).mean(dim=1)  # (seeds, layers)
    against = (by_layer < 0).double().mean(dim=1)
    seen = {
        "rank correlation": by_layer.mean(dim=1).tolist(),
        "share of layers where negative": against.tolist(),
        "in the first two layers": by_layer[:, :2].mean(dim=1).tolist(),
    }
    expect(
        bool((against > 0.5).all() and (by_layer.mean(dim=1) < 0).all()),
        f"short keys draw no more attention than long ones: {seen}",
    )
    return seen


@claim(slow=True)
def short_keys_beat_long_ones(case: CacheCase) -> Seen:
    """Keeping the shortest keys keeps predictions nearer to those with the whole cache than keeping the longest."""
    short, long = read_on(case, case.method), read_on(case, _Longest())
    seen = {
        "divergence": short.divergence.tolist(),
        "with the longest": long.divergence.tolist(),
        "share of attention kept": short.share.tolist(),
        "with the longest keys": long.share.tolist(),
    }
    expect(bool((short.divergence < long.divergence).all()), f"long keys do as well: {seen}")
    expect(bool((short.share > 2 * long.share).all()), f"long keys hold as much attention: {seen}")
    return seen


def _rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, over the last dimension."""
    ranks = [x.argsort(dim=-1).argsort(dim=-1).double() for x in (one, other)]
    ranks = [r - r.mean(dim=-1, keepdim=True) for r in ranks]
    return (ranks[0] * ranks[1]).sum(-1) / (ranks[0].square().sum(-1) * ranks[1].square().sum(-1)).sqrt()
