"""Claims of TOVA: the last query tells what to keep, first tokens included, without protecting anything."""

from __future__ import annotations

import torch

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import BUDGET, READ, beats_a_window, holds_more_attention
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.data.text import passages


@claim(slow=True)
def the_last_query_finds_what_holds_the_attention(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    return holds_more_attention(case, case.method)


@claim(slow=True)
def it_beats_a_window(case: CacheCase) -> Seen:
    """Predictions stay nearer to those with the whole cache than with a window of recent tokens of the same size."""
    return beats_a_window(case, case.method)


@claim(slow=True)
@torch.no_grad()
def the_first_token_stays_unprotected(case: CacheCase) -> Seen:
    """With nothing protected, nine layers in ten keep the first token, and still do after decoding for a while."""
    model, tokenizer = case.lm
    steps = 16
    tokens = passages(tokenizer, READ + steps, case.seeds).to(model.device)
    with case.on_lm(budget=BUDGET, sinks=0, recent=0).attach(model) as kept:
        cache = kept.new_cache()
        model(tokens[:, :READ], past_key_values=cache, logits_to_keep=1)
        for n in range(READ, READ + steps):
            model(tokens[:, n : n + 1], past_key_values=cache)
        holds = torch.stack([(cache.positions(layer) == 0).any(dim=2)[:, 0] for layer in range(len(cache.layers))])
    seen = {"share of layers that hold the first token": holds.double().mean(dim=0).tolist()}
    expect(bool((holds.double().mean(dim=0) >= 0.9).all()), f"the first token is lost: {seen}")
    return seen
