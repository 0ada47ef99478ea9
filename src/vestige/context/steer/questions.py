"""Questions with several answers, and the heads whose calibration makes the right ones likelier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vestige.core.anatomy import Anatomy
from vestige.errors import InputError, SpecError

if TYPE_CHECKING:
    from vestige.context.steer.act import ACT

__all__ = ["Question", "choose_heads", "likelihood", "sink_heads"]


@dataclass(frozen=True)
class Question:
    """A question and the answers to choose from, as token ids.

    Attributes:
        prompt: what the model reads.
        answers: at least two, each of a token or more.
        right: which of them is right.

    Raises:
        InputError: an empty prompt or answer, fewer than two answers, or a right one that is not among them.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    right: int

    def __post_init__(self) -> None:
        if not self.prompt or len(self.answers) < 2 or not all(self.answers):
            raise InputError("a question needs a prompt and at least two answers, each of a token or more")
        if not 0 <= self.right < len(self.answers):
            raise InputError(f"the right answer is number {self.right}, and there are {len(self.answers)} answers")

    @classmethod
    def of(cls, tokenizer: Any, prompt: str, answers: Sequence[str], right: int) -> Question:
        """A question in words; the answers follow the prompt as they stand, spaces included."""
        words = [tuple(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        return cls(tuple(tokenizer(prompt)["input_ids"]), tuple(words), right)


def choose_heads(
    method: ACT,
    model: nn.Module,
    questions: Sequence[Question],
    layers: Sequence[int],
    *,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Heads whose calibration, each alone, raises :func:`likelihood`.

    The paper goes by accuracy over hundreds of questions. On a few, accuracy moves in steps that one head seldom makes,
    so the likelihood that it is made of is compared instead. Heads that have no sink in any question are not tried:
    nothing would change.

    Raises:
        InputError: there are no questions.
        SpecError: no rows in a batch.
    """
    if not questions:
        raise InputError("there are no questions to choose heads by")
    if batch < 1:
        raise SpecError(f"parameter 'batch' is {batch!r}; allowed: int, >= 1")
    before = float(likelihood(model, questions, batch=batch).mean())
    tried = sink_heads(method, model, questions, layers, batch=batch)
    chosen = []
    for number, head in enumerate(tried):
        with method.replace(heads=(head,), chosen_on=None).attach(model):
            if float(likelihood(model, questions, batch=batch).mean()) > before:
                chosen.append(head)
        if progress is not None:
            progress(number + 1, len(tried))
    return tuple(chosen)


@torch.no_grad()
def likelihood(model: nn.Module, questions: Sequence[Question], *, batch: int = 8) -> Tensor:
    """``(questions,)`` log-probability of the right answer among those to choose from."""
    found = torch.cat([_answer(model, rows) for rows in _batches(questions, batch)])
    totals = found.split([len(question.answers) for question in questions])
    return torch.stack([part.log_softmax(dim=0)[q.right] for part, q in zip(totals, questions, strict=True)])


@torch.no_grad()
def sink_heads(
    method: ACT, model: nn.Module, questions: Sequence[Question], layers: Sequence[int], *, batch: int = 8
) -> list[tuple[int, int]]:
    """(layer, query head) pairs of some layers that have a sink beyond the first token in any of the questions."""
    heads = Anatomy.of(model).num_heads
    every = tuple((layer, head) for layer in layers for head in range(heads))
    found: set[tuple[int, int]] = set()
    with method.replace(heads=every, chosen_on=None, beta=1.0).attach(model) as kept:
        for rows in _batches(questions, batch):
            ids, mask = _padded(rows, model)
            cache = kept.new_cache()
            model(ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache)
            for layer in layers:
                sinks = cache.layers[layer].aside.get("sinks")
                if sinks is not None:
                    found |= {(layer, head) for head in (sinks >= 0).any(dim=2).any(dim=0).nonzero().flatten().tolist()}
    return sorted(found)


def _batches(questions: Sequence[Question], batch: int) -> list[list[tuple[tuple[int, ...], int]]]:
    """Prompts with each of their answers, and the length of the answer; so many at once."""
    rows = [(q.prompt + answer, len(answer)) for q in questions for answer in q.answers]
    return [rows[first : first + batch] for first in range(0, len(rows), batch)]


def _padded(rows: list[tuple[tuple[int, ...], int]], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Rows filled up on the left, and their mask."""
    width = max(len(ids) for ids, _ in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row, _ in rows], device=device)
    lengths = torch.tensor([len(row) for row, _ in rows], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, mask.long()


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def _answer(model: nn.Module, rows: list[tuple[tuple[int, ...], int]]) -> Tensor:
    """``(rows,)`` log-probability of the answers at the rows' ends."""
    ids, mask = _padded(rows, model)
    longest = max(length for _, length in rows)
    logits = model(
        ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, logits_to_keep=longest + 1
    ).logits
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = exact[:, -longest - 1 : -1].log_softmax(dim=-1).gather(2, ids[:, -longest:, None]).squeeze(2)
    lengths = torch.tensor([length for _, length in rows], device=each.device)
    counted = torch.arange(longest, device=each.device) >= longest - lengths[:, None]
    return (each * counted).sum(dim=1)
