"""Claims of ACT: there are sinks beyond the first token."""

from __future__ import annotations

import torch

from vestige.core.anatomy import Anatomy
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import READ
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.data.text import passages

EARLY = READ // 2  # tokens that many queries see: the last ones draw attention from few, and so much on average


@claim(slow=True)
@torch.no_grad()
def there_are_sinks_beyond_the_first_token(case: CacheCase) -> Seen:
    """In nearly all layers, and in half of the heads, an early token past the first draws several times the average
    attention."""
    model, tokenizer = case.lm
    anatomy = Anatomy.of(model)
    tokens = passages(tokenizer, READ, case.seeds).to(model.device)
    every = tuple((layer, head) for layer in range(anatomy.num_layers) for head in range(anatomy.num_heads))
    with case.on_lm(heads=every, chosen_on=None, beta=1.0).attach(model) as kept:
        model(tokens, use_cache=True, logits_to_keep=1)
        assert kept.cache is not None
        found = [layer.aside["sinks"].cpu() for layer in kept.cache.layers if "sinks" in layer.aside]
    have = torch.stack([((sinks >= 0) & (sinks < EARLY)).any(dim=2) for sinks in found], dim=1).double()
    layers = have.amax(dim=2).sum(dim=1) / anatomy.num_layers
    heads = have.sum(dim=(1, 2)) / len(every)
    bare = torch.tensor([[not any(c.isalpha() for c in tokenizer.decode([t])) for t in row] for row in tokens.tolist()])
    mute = [
        float(bare[seed][torch.cat([s[seed][(s[seed] >= 0) & (s[seed] < EARLY)] for s in found])].double().mean())
        for seed in range(len(case.seeds))
    ]
    seen = {
        "share of layers": layers.tolist(),
        "share of heads": heads.tolist(),
        "sinks without a letter": mute,
        "tokens without a letter": bare[:, :EARLY].double().mean(dim=1).tolist(),
    }
    expect(bool((layers > 0.9).all() and (heads > 0.5).all()), f"few heads have sinks: {seen}")
    return seen
