"""Claims about retrieval heads: few heads copy, the same ones for any text, and without them nothing is retrieved."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vestige.evidence.certify.evidence import HeadsCase
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.probes.retrieval_heads import HeadScores, RetrievalHeads
from vestige.evidence.tasks.needle import Needle

SILENCED = 5


@claim(slow=True)
def without_the_top_heads_nothing_is_retrieved(case: HeadsCase) -> Seen:
    """Silencing the top heads takes away nearly all answers; silencing as many random others takes away few."""
    scores = _measured(case.lm, case.method, case.seeds)
    # Prompts that the scores were not measured on.
    needles = [Needle(length=200, depth=depth, seed=100 + seed) for seed in case.seeds for depth in (0.2, 0.7)]
    table = case.method.causal_check(*case.lm, scores, heads=(SILENCED,), draws=3, needles=needles)
    rate = table.assign(rate=table["found"] / table["prompts"]).set_index("kind")["rate"]
    seen = {"whole model": rate["none"], "without the top": rate["top"], "without random ones": rate["random"].tolist()}
    expect(rate["none"] >= 0.8, f"the model itself retrieves too little: {seen}")
    expect(rate["top"] <= 0.2 * rate["none"], f"without the top heads it still retrieves: {seen}")
    expect(float(rate["random"].median()) >= 0.8 * rate["none"], f"random heads matter as much: {seen}")
    return seen


@claim(slow=True)
def few_heads_retrieve_whatever_the_text(case: HeadsCase) -> Seen:
    """Under a sixth of the heads reach the threshold, and prompts of other seeds rank the same ones first."""
    scores = _measured(case.lm, case.method, case.seeds)
    heads, share = scores.heads(), len(scores.heads()) / scores.scores.size
    expect(len(heads) >= 3, f"only {len(heads)} heads reach the threshold")
    expect(share < 1 / 6, f"{share:.0%} of the heads reach the threshold")
    tops = []
    for seed in case.seeds:
        mean = np.mean([probed.shares for probed in scores.answered if probed.needle.seed == seed], axis=0)
        tops.append(set(np.argsort(-mean, axis=None, kind="stable")[:5].tolist()))
    common = len(set.intersection(*tops))
    seen = {"retrieval heads": len(heads), "share": share, "of the top five common to all seeds": common}
    expect(common >= 3, f"other texts find other heads: {seen}")
    return seen


@functools.lru_cache(maxsize=2)
def _measured(lm: tuple[Any, Any], method: RetrievalHeads, seeds: tuple[int, ...]) -> HeadScores:
    return method.replace(lengths=(200,), depths=(0.2, 0.8), seeds=seeds).measure(*lm)
