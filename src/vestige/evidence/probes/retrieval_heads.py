"""Retrieval heads: the few attention heads that copy what is looked up from the context."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError, SpecError
from vestige.evidence.probes.probe import Probe
from vestige.evidence.tasks.haystack import GRAMMAR, check_source
from vestige.evidence.tasks.needle import Needle, NeedlePrompt

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vestige.context.kept import Kept

__all__ = ["HeadScores", "Probed", "RetrievalHeads", "copied_share", "recalled"]


@dataclass(frozen=True)
class Probed:
    """One prompt looked at.

    Attributes:
        needle: the prompt.
        said: the tokens that the model wrote.
        recall: share of the answer's tokens among them.
        shares: share of the answer's tokens that each head copied.
        places: position in the prompt that each head looked at most while each token was written; not kept by
            ledgers.
    """

    needle: Needle
    said: tuple[int, ...]
    recall: float
    shares: Float[np.ndarray, "layers heads"]
    places: Int[np.ndarray, "steps layers heads"] | None = None


@dataclass(frozen=True)
class HeadScores:
    """Retrieval scores of every head: the mean of its shares over the prompts that the model answered."""

    prompts: tuple[Probed, ...]
    threshold: float

    @property
    def answered(self) -> tuple[Probed, ...]:
        """The prompts of whose answer the model recalled more than half; the others say nothing about copying."""
        return tuple(probed for probed in self.prompts if probed.recall > RetrievalHeads.RECALL)

    @property
    def scores(self) -> Float[np.ndarray, "layers heads"]:
        """Score of every head, 0 to 1; zero throughout where no prompt was answered."""
        used = self.answered
        return np.mean([p.shares for p in used], axis=0) if used else np.zeros_like(self.prompts[0].shares)

    def heads(self) -> list[tuple[int, int]]:
        """The retrieval heads, ``(layer, head)``: those that reach the threshold, the highest score first."""
        ranked, scores = self.ranking(), self.scores
        return [place for place in ranked if scores[place] >= self.threshold]

    def ranking(self) -> list[tuple[int, int]]:
        """All heads, the highest score first; equal ones in the order of the model."""
        scores = self.scores
        order = np.argsort(-scores, axis=None, kind="stable")
        return [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, scores.shape), strict=True)]

    def table(self) -> pd.DataFrame:
        """One row per head: ``layer``, ``head``, ``score``, ``retrieval_head``; the highest score first."""
        import pandas as pd

        scores = self.scores
        rows = [(layer, head, float(scores[layer, head])) for layer, head in self.ranking()]
        frame = pd.DataFrame(rows, columns=["layer", "head", "score"])
        return frame.assign(retrieval_head=frame["score"] >= self.threshold)

    def figure(self) -> Any:
        """The heat map of all heads, as a plotly figure."""
        from vestige.evidence.report.figures import head_map

        return head_map(self.scores, "retrieval score")


class RetrievalHeads(Probe):
    """Score each head by how often it looks at the very token that the model is copying out of its context.

    While the model answers a needle prompt, a head copies a token when its largest attention weight lies on a token
    of the answer in the context, and that token is the one the model generates next. With *k* the answer's tokens
    in the context and *g* those of them that head *h* copied, its score for the prompt is |g ∩ k| / |k|; the score
    of a head is the mean over the prompts that the model answers. A few heads score high, on every kind of text;
    without them the model cannot retrieve.
    """

    name = "retrieval-heads"
    paper = Paper(
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2024,
        arxiv="2404.15574",
        venue="ICLR 2025",
        code="https://github.com/nightdessert/Retrieval_Head",
        equations="the retrieval score (section 2), threshold 0.1; masking the top heads (section 4)",
    )
    verdict = Verdict(
        "reproduced",
        "SmolLM2-135M: 18 of 270 heads reach the threshold, four of the top five the same for all seeds; silencing the "
        "top 5 takes answers from 6 of 6 to 0, silencing 5 random others leaves 6, 6 and 1",
    )

    RECALL: ClassVar[float] = 0.5  # share of the answer's tokens that makes a prompt count

    lengths: tuple[int, ...] = param((256, 512), "lengths of the prompts' contexts, in tokens")
    depths: tuple[float, ...] = param((0.1, 0.5, 0.9), "where the needle stands in the context, 0 to 1")
    seeds: tuple[int, ...] = param((0,), "seeds of the prompts")
    answers: tuple[Literal["number", "words"], ...] = param(("number", "words"), "what the needles hide")
    haystack: str = param(GRAMMAR, "filler text: 'grammar', or 'file:PATH' for a UTF-8 text file")
    threshold: float = param(0.1, "score from which a head counts as a retrieval head", gt=0, le=1)
    batch: int = param(4, "prompts that run together", ge=1)

    def check(self) -> None:
        for name in ("lengths", "depths", "seeds", "answers"):
            if not getattr(self, name):
                raise SpecError(f"{self.name}: parameter {name!r} is (); at least one value is needed")
        check_source(self.haystack)
        self.needles()

    def needles(self) -> list[Needle]:
        """The prompts that are looked at: every length, depth, seed and kind of answer."""
        return [
            Needle(length=length, depth=depth, seed=seed, answer=answer, haystack=self.haystack)
            for length in self.lengths
            for answer in self.answers
            for seed in self.seeds
            for depth in self.depths
        ]

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HeadScores:
        """Score every head.

        Raises:
            UnsupportedModelError: the model is no causal decoder that Vestige knows.
            InputError: a context is too short for the needle.
        """
        return HeadScores(tuple(self.stream(model, tokenizer)), self.threshold)

    def stream(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needles: Sequence[Needle] | None = None
    ) -> Iterator[Probed]:
        """Look at prompts one batch after the other, for those who want to show or store progress."""
        from vestige.context.evict.full import Full

        prompts = [needle.build(tokenizer) for needle in (self.needles() if needles is None else needles)]
        for first in range(0, len(prompts), self.batch):
            some = prompts[first : first + self.batch]
            with Full().attach(model) as kept:
                said, attended = _answer(model, tokenizer, some, kept)
            for row, prompt in enumerate(some):
                words = said[row]
                places = attended[: len(words), :, row]
                shares = copied_share(places, words, prompt.context_ids, prompt.answer_span)
                yield Probed(prompt.needle, words, recalled(words, prompt.answer_ids), shares, places)

    def causal_check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scores: HeadScores,
        *,
        heads: Sequence[int] = (5, 10, 20),
        draws: int = 3,
        needles: Sequence[Needle] | None = None,
    ) -> pd.DataFrame:
        """Silence the top heads, and as many random other ones, and see whether the model still retrieves.

        The random heads are drawn from all others (the top ones excluded), anew for each draw.

        Args:
            scores: what :meth:`measure` gave.
            heads: how many heads to silence.
            draws: random choices per number of heads.
            needles: prompts to try on; default: those of the probe.

        Returns:
            One row per trial: ``silenced`` (0 for the model as it is), ``kind`` (``none``, ``top``, ``random``),
            ``draw``, ``found`` and ``prompts`` (how many of the prompts were answered in full).

        Raises:
            InputError: there are not that many heads.
        """
        import pandas as pd

        from vestige.evidence.probes.head_mask import mask_heads

        ranking = scores.ranking()
        for count in heads:
            if type(count) is not int or not 1 <= count <= len(ranking) // 2:
                raise InputError(f"heads holds {count!r}; allowed: 1 to {len(ranking) // 2}, half of the model's heads")
        trials: list[tuple[int, str, int, list[tuple[int, int]]]] = [(0, "none", 0, [])]
        for count in heads:
            trials.append((count, "top", 0, ranking[:count]))
            for draw in range(draws):
                others = random.Random(f"random heads {count} {draw}").sample(ranking[count:], count)
                trials.append((count, "random", draw, others))
        prompts = [needle.build(tokenizer) for needle in (self.needles() if needles is None else needles)]
        rows = []
        for count, kind, draw, silent in trials:
            with mask_heads(model, silent):
                found = sum(_found(model, prompts[i : i + self.batch]) for i in range(0, len(prompts), self.batch))
            rows.append((count, kind, draw, found, len(prompts)))
        return pd.DataFrame(rows, columns=["silenced", "kind", "draw", "found", "prompts"])


def copied_share(
    attended: Int[np.ndarray, "steps layers heads"],
    said: Sequence[int],
    context: Sequence[int],
    span: tuple[int, int],
) -> Float[np.ndarray, "layers heads"]:
    """Share of the tokens in ``span`` that each head copied.

    Args:
        attended: the position that each head looked at most while each token was generated.
        said: the tokens generated.
        context: the tokens of the prompt.
        span: first and one-past-last position of the answer in the prompt.
    """
    first, last = span
    answer = np.asarray(context[first:last])
    said_here = np.asarray(said, dtype=np.int64)[:, None, None]
    inside = (attended >= first) & (attended < last)
    place = np.clip(attended - first, 0, len(answer) - 1)
    copied = inside & (answer[place] == said_here)
    marks = np.zeros((*attended.shape[1:], len(answer)), dtype=bool)
    for step_place, step_copied in zip(place, copied, strict=True):
        layer, head = np.nonzero(step_copied)
        marks[layer, head, step_place[layer, head]] = True
    return marks.mean(axis=-1)


def recalled(said: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer's tokens that were generated, in any order."""
    return sum((Counter(answer) & Counter(said)).values()) / len(answer)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[NeedlePrompt], kept: Kept
) -> tuple[list[tuple[int, ...]], Int[np.ndarray, "steps layers batch heads"]]:
    """Generate each prompt's answer greedily; what was said, and where each head looked most for each token."""
    import torch
    from transformers import GenerationConfig

    windows = kept.anatomy.sliding_windows
    looks: list[list[Tensor]] = [[] for _ in windows]

    def look(layer: int, query: Tensor, keys: Tensor, positions: Tensor | None, scaling: float) -> None:
        looks[layer].append(_most_attended(query, keys, positions, windows[layer]))

    width = max(len(prompt.input_ids) for prompt in prompts)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    padded = [[fill] * (width - len(prompt.input_ids)) + list(prompt.input_ids) for prompt in prompts]
    mask = [[0] * (width - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt in prompts]
    ends = _end_tokens(model)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(len(prompt.answer_ids) for prompt in prompts),
        eos_token_id=ends or None,
        pad_token_id=fill,
    )
    watch = kept.watch(look)
    with torch.inference_mode():
        written = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
        )
    watch.remove()
    said = [_until(row[width:], ends, len(p.answer_ids)) for row, p in zip(written.tolist(), prompts, strict=True)]
    attended = torch.stack([torch.stack(steps) for steps in looks], dim=1)
    return said, attended.cpu().numpy()


def _most_attended(query: Tensor, keys: Tensor, positions: Tensor | None, window: int | None) -> Tensor:
    """Original position ``(batch, heads)`` of the key to which the last query attends most.

    The largest weight is where the largest logit is, so nothing needs to be normalised.
    """
    import torch

    batch, _, _, dim = query.shape
    rows = query[:, :, -1].view(batch, keys.shape[1], -1, dim)
    logits = (rows @ keys.transpose(-1, -2)).float()  # (batch, kv, group, slots)
    if positions is None:
        positions = torch.arange(keys.shape[2], device=keys.device).expand(batch, keys.shape[1], -1)
    positions = positions.long()
    hidden = positions < 0
    if window is not None:
        hidden = hidden | (positions <= positions.amax(dim=2, keepdim=True) - window)
    best = logits.masked_fill(hidden[:, :, None], float("-inf")).argmax(dim=-1)
    return positions.gather(2, best).flatten(1, 2)


def _found(model: PreTrainedModel, prompts: Sequence[NeedlePrompt]) -> int:
    """How many prompts the model answers in full; those of one length share a pass."""
    import torch

    from vestige.evidence.tasks.needle import context_batch, recite

    found = 0
    for length in sorted({len(prompt.context_ids) for prompt in prompts}):
        some = [prompt for prompt in prompts if len(prompt.context_ids) == length]
        with torch.inference_mode():
            read = model(context_batch(some, model.device), use_cache=True, logits_to_keep=1)
        found += sum(recital.found for recital in recite(model, some, read.past_key_values))
    return found


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _until(tokens: list[int], ends: list[int], most: int) -> tuple[int, ...]:
    """The tokens before the first end token, ``most`` at most."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: min(stop, most)])
