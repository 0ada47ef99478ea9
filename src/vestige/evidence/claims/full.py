"""Claims of the whole cache: it is the identity."""

from __future__ import annotations

import torch

from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.data.text import passages

LENGTH = 16


@claim
def generation_is_the_models_own(case: CacheCase) -> Seen:
    """Attached, the model writes token for token what it writes alone, greedily and with beams, batched."""
    model, tokenizer = case.lm
    tokens = passages(tokenizer, LENGTH, case.seeds).to(model.device)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # the first row is shorter than the others
    for beams in (1, 3):
        options = {"attention_mask": mask, "num_beams": beams, "max_new_tokens": 6, "do_sample": False}
        alone = model.generate(tokens, **options)
        with case.method.attach(model):
            attached = model.generate(tokens, **options)
        expect(torch.equal(alone, attached), f"with {beams} beams the tokens differ")
    return {"tokens": int(alone[:, LENGTH:].numel()), "rows": len(tokens)}
