"""Claims of SnapKV: a prompt's last queries tell what will be looked at, and what it is asked for if they ask."""

from __future__ import annotations

import torch

from vestige.context.evict.h2o import H2O
from vestige.evidence.certify.caching import CacheCase
from vestige.evidence.certify.reading import holds_more_attention
from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.claims import claim
from vestige.evidence.tasks.needle import Needle, NeedlePrompt

WINDOW = 16  # queries that vote: the claims' budgets are small
LENGTH, BUDGET = 192, 64


@claim(slow=True)
def the_window_foresees_attention(case: CacheCase) -> Seen:
    """The entries kept receive more of later tokens' attention than sinks and a window of the same size."""
    return holds_more_attention(case, case.method.replace(window_size=WINDOW))


@claim(slow=True)
@torch.no_grad()
def a_question_in_the_window_finds_its_answer(case: CacheCase) -> Seen:
    """With the question at the prompt's end more of the number asked for is kept than by accumulated attention."""
    model, tokenizer = case.lm
    found: dict[str, list[float]] = {}
    prompts = [Needle(length=LENGTH, depth=0.4, seed=seed).build(tokenizer) for seed in case.seeds]
    for policy in (case.method.replace(budget=BUDGET, window_size=WINDOW), H2O(budget=BUDGET, when="prefill")):
        with policy.attach(model):
            found[policy.name] = [_recalled(model, prompt) for prompt in prompts]
    seen = {f"share of the answer found by {name}": shares for name, shares in found.items()}
    more = all(mine > other for mine, other in zip(found["snapkv"], found["h2o"], strict=True))
    expect(more, f"the question helps no more than accumulation: {seen}")
    return seen


def _recalled(model: torch.nn.Module, prompt: NeedlePrompt) -> float:
    """Share of the answer's tokens that come out, after the whole prompt with its question has been cut."""
    answer = list(prompt.answer_ids)
    asked = model(torch.tensor([prompt.input_ids], device=model.device), use_cache=True, logits_to_keep=1)
    ahead = torch.tensor([answer[:-1]], device=model.device)
    rest = model(ahead, past_key_values=asked.past_key_values)
    said = torch.cat([asked.logits, rest.logits], dim=1)[0].argmax(dim=-1).tolist()
    return sum(a == b for a, b in zip(said, answer, strict=True)) / len(answer)
