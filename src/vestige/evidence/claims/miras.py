"""Claims of Miras: its models are its choices, and a choice can be made for a reason."""

from __future__ import annotations

import vestige
from vestige.evidence.certify.memorising import answers, error, pairs
from vestige.evidence.certify.mixing import LayerCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim

MODELS = {
    "moneta": {"loss": "lp", "keep": "q-norm"},
    "yaad": {"loss": "huber"},
    "memora": {"keep": "kl"},
    "titans": {"learning": "momentum"},
}


@claim
def its_models_are_choices(case: LayerCase) -> Seen:
    """Moneta, Yaad, Memora and Titans are Miras with one or two choices changed: the same outputs from the same
    weights; and each choice changes the outputs."""
    largest, apart = 0.0, float("inf")
    for seed in case.seeds:
        keys, values = pairs(12, 8, seed)
        plain = answers(case.fitted, keys, values, seed)
        for name, choices in MODELS.items():
            model = vestige.method(name, refresh=case.fitted.refresh, expand=case.fitted.expand)
            mine = answers(case.fitted.replace(**choices), keys, values, seed, momentum=0.5)
            largest = max(largest, float((mine - answers(model, keys, values, seed, momentum=0.5)).abs().max()))
            apart = min(apart, error(mine, plain))
    expect(largest < 1e-12, f"a model differs from its choices by {largest:.3g}")
    expect(apart > 1e-6, "a choice changes nothing")
    return {"largest difference": largest, "least that a choice changes": apart}
