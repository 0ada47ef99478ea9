"""Tasks of the lm-evaluation-harness on a model with a cache policy attached.

The harness scores a continuation in one pass over prompt and continuation together, so a policy that drops entries
after the prompt would never show. :class:`PolicyLM` reads the prompt first, lets the policy cut the cache, and scores
the continuation, with the prompt's last token, out of what was kept; what the harness generates is generated under the
policy. ::

    import lm_eval
    from vestige.evidence.harness import PolicyLM

    lm = PolicyLM(model, tokenizer, policy=vestige.method("snapkv", budget=256), batch_size=4)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from vestige.context.policy import CachePolicy
from vestige.errors import InputError, MissingPackageError, SpecError
from vestige.evidence.tasks.asking import Heard, ask_all
from vestige.evidence.tasks.task import Example, Question

try:
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise MissingPackageError("lm-eval", "the bridge to its tasks", "pip install 'vestige[lm-eval]'") from None

__all__ = ["PolicyLM"]

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, prompt's tokens, continuation's tokens


class PolicyLM(HFLM):
    """A model of the harness whose cache holds what a policy keeps.

    Args:
        model: a loaded causal language model.
        tokenizer: its tokenizer.
        policy: what its cache keeps; ``None`` for everything.
        batch_size: prompts that run together; results do not depend on it.
        options: further ones of the harness's ``HFLM``.

    Raises:
        SpecError: ``policy`` is no cache policy, or ``batch_size`` is not 1 or more.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, policy: CachePolicy | None = None, batch_size: int = 1, **options: Any
    ) -> None:
        if policy is not None and not isinstance(policy, CachePolicy):
            raise SpecError(f"policy is {policy!r}; allowed: a cache policy, or None")
        if type(batch_size) is not int or batch_size < 1:
            raise SpecError(f"batch_size is {batch_size!r}; allowed: int >= 1 (prompts)")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
        self.policy = policy

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refused: these tasks score text that follows nothing, so there is no cache that a policy could cut.

        Raises:
            SpecError: always; :class:`vestige.evidence.tasks.perplexity.Perplexity` measures text after its past.
        """
        raise SpecError(
            "this task scores text that follows no prompt, where a cache policy has nothing to cut; "
            "Vestige's own task 'perplexity' measures text after its past"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        places: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        asked = []
        for _, before, continuation in requests:
            whole = [*before, *continuation][-self.max_length :]
            kept = tuple(whole[: len(whole) - len(continuation)])
            if not kept:
                raise InputError(f"a continuation of {len(continuation)} tokens leaves no room for its prompt")
            asked.append((kept, tuple(continuation)))
            places.setdefault(kept, []).append(tuple(continuation))
        # The longest first, as the harness does: what does not fit into memory fails at once.
        prompts = sorted((prompt for prompt in places if len(prompt) > 1), key=lambda prompt: (-len(prompt), prompt))
        examples = [
            Example(context=prompt[:-1], questions=(Question(ids=prompt[-1:], choices=tuple(places[prompt])),))
            for prompt in prompts
        ]
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        told = ask_all(self.model, examples, [(self.policy, None)], self.batch_size, False, 0) if examples else []
        for one in told:
            for prompt, (heard,) in zip(prompts, one.heard, strict=True):
                for answer, each in zip(places[prompt], heard, strict=True):
                    found[prompt, answer] = _result(each, answer)
        bare = [request for request, (prompt, _) in zip(requests, asked, strict=True) if len(prompt) == 1]
        plain = iter(super()._loglikelihood_tokens(bare, disable_tqdm=True) if bare else ())
        results = [found[pair] if pair in found else next(plain) for pair in asked]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy.attach(self.model) if self.policy is not None else nullcontext():
            return super()._model_generate(*args, **kwargs)


def _result(heard: Heard, answer: tuple[int, ...]) -> tuple[float, bool]:
    return sum(heard.logprobs), heard.likely == answer
