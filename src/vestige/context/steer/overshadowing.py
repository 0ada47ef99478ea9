r"""Overshadowing: a common condition of a prompt hides a rare one. Found before it does harm, and decoded against."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from vestige.core.method import Method, Paper, Verdict, param
from vestige.core.patch import Patch
from vestige.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

__all__ = ["Hidden", "SelfContrast", "Steered", "contrast", "indicator", "plausible"]

Span = tuple[int, int]
Spans = Callable[[Sequence[int]], Iterable[Span]]
"""Takes a prompt's tokens, without padding, and gives the conditions in it: first and one-past-last token of each."""


def plausible(log_p: Float[Tensor, "rows vocabulary"], alpha: float) -> Bool[Tensor, "rows vocabulary"]:
    """Tokens with at least the share ``alpha`` of the likeliest one's probability."""
    return log_p >= log_p.amax(dim=-1, keepdim=True) + math.log(alpha)


def contrast(
    log_p: Float[Tensor, "rows vocabulary"], log_q: Float[Tensor, "rows vocabulary"], alpha: float
) -> Float[Tensor, "rows vocabulary"]:
    """How much likelier the whole prompt (``log_p``) makes each token than the shortened one (``log_q``) does.

    Minus infinity for tokens that are implausible after the whole prompt. Those that are implausible after the
    shortened one count there as if they were just plausible.
    """
    bound = log_q.amax(dim=-1, keepdim=True) + math.log(alpha)
    return (log_p - log_q.maximum(bound)).masked_fill(~plausible(log_p, alpha), -math.inf)


def indicator(
    log_p: Float[Tensor, "rows vocabulary"], log_q: Float[Tensor, "rows vocabulary"], alpha: float
) -> Float[Tensor, " rows"]:
    """How much the missing condition was overshadowed: far below zero where without it tokens are likelier.

    The sum of the negative contrasts of the tokens that are plausible either way, and of all contrasts of those that
    are plausible after the whole prompt alone: what a condition brings into play speaks for its being heard.
    """
    scores = contrast(log_p, log_q, alpha)
    either = plausible(log_q, alpha)
    counted = torch.where(either, scores.clamp_max(0), scores)
    return counted.masked_fill(~plausible(log_p, alpha), 0).sum(dim=-1)


@dataclass(frozen=True)
class Hidden:
    """The most overshadowed condition of a prompt.

    Attributes:
        span: first and one-past-last token of it, in the prompt without its padding; ``None`` where there was none to
            try.
        indicator: see :func:`indicator`, for the first token after the prompt; 0 where there was none to try.
    """

    span: Span | None
    indicator: float


class SelfContrast(Method):
    r"""Decode against what the model would say if it had not read the condition that it neglects.

    A prompt :math:`X` asks with several conditions, of which training has seen some far more often. A condition is
    overshadowed where the prompt without it, :math:`X'`, makes the likely tokens likelier still. Among the tokens
    :math:`V(X) = \{y : p(y|X) \ge \alpha \max_w p(w|X)\}`, the contrast of a token is

        R(y) = log p(y|X) - log max(p(y|X'), alpha max_w p(w|X')),

    and the condition's indicator is the sum of min(R, 0) over :math:`V(X) \cap V(X')` and of R over what of
    :math:`V(X)` lies outside :math:`V(X')`. Each condition of the prompt is left out in turn; the one with the lowest
    indicator is what is contrasted with, at every step at which its indicator lies below the threshold. The step's
    token then goes by R instead of the probability. Nothing is trained.

    It costs one short reading for each condition that is tried, and from then on a second row beside each row of the
    batch, with a cache of its own.
    """

    name = "overshadowing"
    paper = Paper(
        title="Knowledge Overshadowing Causes Amalgamated Hallucination in Large Language Models",
        year=2024,
        arxiv="2407.08039",
        equations="relative mutual information with a shortened prompt, the indicator with escaping tokens, and "
        "self-contrastive decoding (section 5); where the paper takes the least plausible token's probability for an "
        "escaping token, the bound of plausibility itself is taken",
    )
    verdict = Verdict(
        "reproduced",
        "small models that learnt 16 common statements for each rare one, three seeds: of the rare questions that get "
        "the common answer (54, 33, 52 %) self-contrast leaves 42, 17, 35 %, and all common ones stay right; the "
        "indicator foresees which (0.92 to 0.94)",
    )

    alpha: float = param(0.1, "a token is plausible from this share of the likeliest one's probability on", gt=0, le=1)
    threshold: float = param(0.0, "a step is overshadowed, and contrasted, where the indicator lies below", le=0)
    tried: int = param(128, "tokens at the end of a prompt that are left out in turn, where no spans are given", ge=1)
    batch: int = param(32, "shortened prompts that are read at once", ge=1)

    def attach(self, model: nn.Module, *, spans: Spans | None = None) -> Steered:
        """Make ``model.generate`` decode against overshadowed conditions, until the result is left or undone.

        Greedy search, sampling and beams of any width, batches with padding on the left.

        Args:
            spans: gives the conditions of a prompt, which are left out one at a time. By default every token but
                the special ones is a condition.

        Raises:
            UnsupportedModelError: the model does not generate, or has an encoder.
            PatchConflictError: something else that steers generation, or a cache policy, is attached.
        """
        return Steered(model, self, spans)


class Steered:
    """Self-contrast attached to a model; a context manager.

    Attributes:
        hidden: the most overshadowed condition of each prompt that was generated from last.
    """

    def __init__(self, model: nn.Module, method: SelfContrast, spans: Spans | None) -> None:
        inside = [part for part in model.modules() if isinstance(part, PreTrainedModel)] if _is_module(model) else []
        if not inside or not inside[0].can_generate() or inside[0].config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{method.name} steers the generation of decoders of transformers; {type(model).__name__} is none"
            )
        self.method, self.hidden = method, ()
        self._spans = spans
        self._patch = Patch(model, method.name, claims={"kv-cache", "generation"})
        self._patch.attribute(model, "generate", _steered(weakref.ref(model), vars(model).get("generate"), self))

    hidden: tuple[Hidden, ...]

    def spans_of(self, model: Any, prompt: Sequence[int]) -> list[Span]:
        """The conditions of a prompt that are tried.

        Raises:
            InputError: a span that was given lies outside the prompt, or is empty.
        """
        if self._spans is None:
            special = _special(model)
            first = max(0, len(prompt) - self.method.tried)
            found = [(i, i + 1) for i in range(first, len(prompt)) if prompt[i] not in special]
        else:
            found = [(int(first), int(last)) for first, last in self._spans(prompt)]
            for span in found:
                if not 0 <= span[0] < span[1] <= len(prompt):
                    raise InputError(f"{self.method.name}: the span {span} is no part of {len(prompt)} tokens")
        return [span for span in found if span[1] - span[0] < len(prompt)]  # something must be left

    def undo(self) -> None:
        """Let the model generate as before; a second call does nothing."""
        self._patch.undo()

    def __enter__(self) -> Self:
        self._patch.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.undo()


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _steered(of: weakref.ref[nn.Module], before: Callable[..., Any] | None, steered: Steered) -> Callable[..., Any]:
    """What stands in the place of a model's ``generate``; it must not keep the model alive."""

    def generate(*args: Any, logits_processor: Sequence[Any] | None = None, **given: Any) -> Any:
        model: Any = of()
        ids = args[0] if args else given.get("inputs", given.get("input_ids"))
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise InputError(f"{steered.method.name} needs the prompts' token ids (batch, tokens) to generate from")
        prompts = _prompts(model, ids, given.get("attention_mask"), steered.method.name)
        against = _Against(model, steered, prompts, ids.shape[1])
        own = before or type(model).generate.__get__(model)
        return own(*args, logits_processor=[*(logits_processor or ()), against], **given)

    return generate


class _Against(LogitsProcessor):
    """Scores each next token against the prompts without their most overshadowed conditions."""

    def __init__(self, model: Any, steered: Steered, prompts: list[list[int]], width: int) -> None:
        self.steered, self.method, self.width = steered, steered.method, width
        self.reader, self.prompts = _Reader(model), prompts
        self.spans = [steered.spans_of(model, prompt) for prompt in prompts]
        self.shortened: list[list[int]] | None = None

    def __call__(self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]) -> Tensor:
        exact = torch.promote_types(scores.dtype, torch.float32)
        log_p = scores.to(exact).log_softmax(dim=-1)
        each = len(input_ids) // len(self.prompts)  # beams, or samples, of each prompt
        if self.shortened is None:
            self.shortened = self._choose(log_p[::each])
        log_q = self.reader.read(self.shortened, input_ids[:, self.width :], each)
        against = contrast(log_p, log_q, self.method.alpha).log_softmax(dim=-1)
        hidden = indicator(log_p, log_q, self.method.alpha) < self.method.threshold
        return torch.where(hidden[:, None], against.to(scores.dtype), scores)

    def _choose(self, log_p: Float[Tensor, "prompts vocabulary"]) -> list[list[int]]:
        """Each prompt without its most overshadowed condition; whole, where it has none."""
        tries = [(row, span) for row, spans in enumerate(self.spans) for span in spans]
        lowest = [Hidden(None, 0.0)] * len(self.prompts)
        for first in range(0, len(tries), self.method.batch):
            some = tries[first : first + self.method.batch]
            log_q = self.reader.next_tokens([_without(self.prompts[row], span) for row, span in some])
            found = indicator(log_p[[row for row, _ in some]], log_q, self.method.alpha).tolist()
            for (row, span), value in zip(some, found, strict=True):
                if lowest[row].span is None or value < lowest[row].indicator:
                    lowest[row] = Hidden(span, value)
        self.steered.hidden = tuple(lowest)
        return [_without(prompt, hidden.span or (0, 0)) for prompt, hidden in zip(self.prompts, lowest, strict=True)]


class _Reader:
    """Reads the shortened prompts and what has been generated since, with a cache where the model has one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Not every decoder knows these; inside a PEFT wrapper the signature is that of the model itself.
        inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
        self.known = inspect.signature(inner.forward).parameters
        self.cache: Cache | None = None
        self.mask: Tensor | None = None
        self.past: Tensor | None = None  # the tokens generated that the cache has seen

    def next_tokens(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities of the token after each row."""
        ids, mask = _left_padded(rows, self.model.device)
        return self._forward(ids, mask, use_cache=False)[0]

    def read(
        self, prompts: Sequence[Sequence[int]], said: Int[Tensor, "rows count"], each: int
    ) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities of the token after each prompt and what was said; ``each`` rows belong to one prompt."""
        order = self._order(said, each)
        if order is None:
            rows = [[*prompts[row // each], *words] for row, words in enumerate(said.tolist())]
            ids, mask = _left_padded(rows, self.model.device)
            log_q, cache = self._forward(ids, mask)
        else:
            assert self.mask is not None and self.cache is not None
            if order != list(range(len(order))):
                self.cache.reorder_cache(torch.tensor(order, device=said.device))
            mask = torch.cat([self.mask[order], self.mask.new_ones(len(said), 1)], dim=1)
            log_q, cache = self._forward(said[:, -1:], mask, past_key_values=self.cache)
        self.cache, self.mask, self.past = cache, mask, said
        return log_q

    def _order(self, said: Tensor, each: int) -> list[int] | None:
        """For each row, the row of the cache that it goes on from; ``None`` where the cache does not serve.

        Beam search moves rows about between two steps, and does not say so; the words tell.
        """
        if self.cache is None or self.past is None or said.shape[1] != self.past.shape[1] + 1:
            return None
        if torch.equal(said[:, :-1], self.past):
            return list(range(len(said)))
        group = torch.arange(len(said), device=said.device) // each
        same = (said[:, None, :-1] == self.past[None]).all(dim=-1) & (group[:, None] == group)
        if not bool(same.any(dim=1).all()) or not hasattr(self.cache, "reorder_cache"):
            return None
        return same.to(torch.uint8).argmax(dim=1).tolist()

    def _forward(self, ids: Tensor, mask: Tensor, **given: Any) -> tuple[Tensor, Cache | None]:
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        optional = {"position_ids": places, "logits_to_keep": 1, "use_cache": True} | given
        output = self.model(ids, attention_mask=mask, **{k: v for k, v in optional.items() if k in self.known})
        logits = output.logits[:, -1]
        exact = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(exact).log_softmax(dim=-1), getattr(output, "past_key_values", None)


def _prompts(model: Any, ids: Tensor, mask: Tensor | None, name: str) -> list[list[int]]:
    """Each row's tokens without padding; as ``generate`` does, a pad token means padding where no mask is given."""
    if mask is None:
        settings = model.generation_config
        pad, ends = settings.pad_token_id, settings.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        mask = ids != pad if pad is not None and pad not in ends else torch.ones_like(ids)
    if mask.shape != ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise InputError(f"{name} needs an attention mask of the prompts' shape {tuple(ids.shape)}, padded on the left")
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def _special(model: Any) -> set[int]:
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return {token for token in (settings.bos_token_id, settings.pad_token_id, *ends) if token is not None}


def _without(prompt: Sequence[int], span: Span) -> list[int]:
    return [*prompt[: span[0]], *prompt[span[1] :]]


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, mask.long()
