"""Claims of A2SF: forgetting makes old and new tokens compete fairly, and so keeps what will be looked at."""

from __future__ import annotations

import torch

from vestige.context.evict.h2o import H2O
from vestige.evidence.certify.caching import CacheCase, feed
from vestige.evidence.certify.reading import read_on
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim


@claim(slow=True)
def forgetting_keeps_what_will_be_looked_at(case: CacheCase) -> Seen:
    """What is kept receives more of later tokens' attention than under h2o, and predictions mostly stay nearer."""
    mine = read_on(case, case.method)
    plain = read_on(case, H2O())
    seen = {
        "share of attention kept": mine.share.tolist(),
        "by h2o": plain.share.tolist(),
        "divergence": mine.divergence.tolist(),
        "of h2o": plain.divergence.tolist(),
    }
    expect(bool((mine.share > plain.share).all()), f"forgetting keeps no more of the attention: {seen}")
    # A single passage may turn on one old token that forgetting has dropped; the middle one of them must gain.
    expect(float((mine.divergence / plain.divergence).quantile(0.5)) < 1, f"predictions are no nearer: {seen}")
    return seen


@claim(slow=True)
def the_factor_decides_which_ages_survive(case: CacheCase) -> Seen:
    """The nearer the factor is to one, the older the entries that are kept."""
    factors = (0.98, 0.995, 1.0)
    ages = torch.stack([read_on(case, case.method.replace(forgetting=f)).age for f in factors])
    seen = {f"mean age at {f}": ages[n].tolist() for n, f in enumerate(factors)}
    expect(bool((ages.diff(dim=0) > 0).all()), f"age does not grow with the factor: {seen}")
    return seen


@claim(slow=True)
def without_forgetting_it_is_h2o(case: CacheCase) -> Seen:
    """With a factor of one every position kept, after the prompt and while decoding, is H2O's."""
    shared = {name: getattr(case.fitted, name) for name in ("budget", "sinks", "recent", "when")}
    chunks = (26, *[1] * 12)
    for seed in case.seeds:
        runs = []
        for policy in (case.fitted.replace(forgetting=1.0), H2O(**shared)):
            model = case.tiny("llama")
            with policy.attach(model) as kept:
                runs.append(feed(model, case.tokens(2, sum(chunks), seed), chunks, kept.new_cache()))
        expect(runs[0].kept == runs[1].kept, f"seed {seed}: other positions are kept")
    return {"steps": len(chunks), "prompts": 2 * len(case.seeds)}
