"""Putting questions to a model: contexts are read, a cache is what is left of them, and questions follow.

Rows of a batch are padded on the left where contexts differ in length, and filled up on the right where questions do:
no token sees what comes after it, so what a row says does not depend on the rows beside it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.context.policy import CachePolicy
from vestige.context.select.base import Select
from vestige.errors import InputError, SpecError, UnsupportedModelError
from vestige.evidence.budgets import at, evicts
from vestige.evidence.engine.bench import WARM_UP, now, time_policy
from vestige.evidence.engine.reading import read, reading_groups

if TYPE_CHECKING:
    from vestige.evidence.tasks.task import Example

__all__ = ["Heard", "Line", "Told", "ask_all", "hear"]

Cell = tuple[CachePolicy | None, int | float | None]


@dataclass(frozen=True)
class Heard:
    """What a model makes of an answer.

    Attributes:
        likely: its most likely token at each place, after the answer's own tokens before it.
        logprobs: natural logarithms of the probabilities of the answer's tokens.
    """

    likely: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """Tokens that are fed after a context, and the answers that they show: those that differ in their last token only.

    Attributes:
        fed: the question, and the answers' tokens but the last.
        begin: place of the token that the answers' first one follows.
        answers: all of one length.
    """

    fed: tuple[int, ...]
    begin: int
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Told:
    """What a model told in one cell.

    Attributes:
        heard: per example and question, what it made of each of the answers.
        kv_bytes, prefill_seconds, decode_seconds_per_token: see :class:`vestige.evidence.tasks.task.TaskScore`.
    """

    heard: Sequence[tuple[tuple[Heard, ...], ...]]
    kv_bytes: int
    prefill_seconds: float
    decode_seconds_per_token: float | None


@dataclass(frozen=True)
class _Turn:
    """A context to be read, and the questions that are then asked: their places in the example, and their lines."""

    example: int
    context: tuple[int, ...]
    lines: tuple[tuple[int, Line], ...]


def ask_all(
    model: Any,
    examples: Sequence[Example],
    cells: Sequence[Cell],
    batch_size: int,
    question_known: bool,
    decode_tokens: int,
) -> list[Told]:
    """Ask all questions of all examples in every cell. See :meth:`vestige.evidence.tasks.task.ContextTask.scores`."""
    if not examples:
        raise InputError("there are no examples to be asked")
    fixed = [_fixed(policy, budget) for policy, budget in cells]
    turns = [turn for index, example in enumerate(examples) for turn in _turns(index, example, question_known)]
    _check_lengths(model, turns)
    tables: list[list[list[dict[tuple[int, ...], Heard]]]] = [
        [[{} for _ in example.questions] for example in examples] for _ in cells
    ]
    held, seconds = [0.0] * len(cells), [0.0] * len(cells)
    for group, places in _groups(fixed):
        for first in range(0, len(turns), batch_size):
            some = turns[first : first + batch_size]
            ids, mask = _padded([turn.context for turn in some], model.device)
            with _reading(model, group, ids, mask) as reading:
                for place in places:
                    policy, budget = fixed[place]
                    cache = reading.cache(group.index(policy) if policy else 0, budget)
                    held[place] += _nbytes(cache)
                    seconds[place] += reading.seconds
                    for turn, number, said in _ask(model, cache, some, mask, isinstance(policy, Select)):
                        tables[place][turn.example][number] |= said
    times = [_decode_seconds(model, policy, budget, turns[0], decode_tokens) for policy, budget in fixed]
    return [
        Told(
            heard=[
                tuple(tuple(found[a] for a in q.answers) for q, found in zip(example.questions, table, strict=True))
                for example, table in zip(examples, tables[place], strict=True)
            ],
            kv_bytes=round(held[place] / len(turns)),
            prefill_seconds=seconds[place] / len(turns),
            decode_seconds_per_token=times[place],
        )
        for place in range(len(cells))
    ]


def hear(model: Any, cache: Any, lines: Sequence[Line], mask: Tensor | None = None, steps: bool = False) -> list[Any]:
    """What a model makes of the answers of one line for each row of a cache. The cache is used up.

    A cache that drops entries after a pass must not be asked in one piece of several passes: one made by ``cut``
    drops none any more.

    Args:
        mask: ``(rows, tokens read)`` 0 for padding, where there is any.
        steps: feed token by token, for policies that act while decoding.

    Returns:
        For each row the :class:`Heard` of each of its line's answers.
    """
    width = max(len(line.fed) for line in lines)
    rows = torch.tensor([[*line.fed, *[line.fed[-1]] * (width - len(line.fed))] for line in lines], device=model.device)
    wanted = width - min(line.begin for line in lines)
    with torch.inference_mode():
        if steps:
            passes = []
            for place in range(width):
                out = model(rows[:, place : place + 1], **_after(model, cache, mask, 1, place))
                if place >= width - wanted:
                    passes.append(out.logits)
            logits = torch.cat(passes, 1)
        else:
            logits = model(rows, **_after(model, cache, mask, width, 0), logits_to_keep=wanted).logits
        likely, told = logits.argmax(-1).tolist(), []
        for row, line in enumerate(lines):
            first = line.begin - (width - wanted)
            size = len(line.answers[0])
            logprobs = logits[row, first : first + size].float().log_softmax(-1)
            each = logprobs.gather(1, torch.tensor(line.answers, device=logprobs.device).T).T.tolist()
            said = tuple(likely[row][first : first + size])
            told.append([Heard(said, tuple(values)) for values in each])
    return told


def _fixed(policy: CachePolicy | None, budget: int | float | None) -> Cell:
    """A cell whose policy is as it is to be attached; a budget of what is read is the policy's own."""
    if policy is not None and not isinstance(policy, CachePolicy):
        raise SpecError(f"the policy of a cell is {policy!r}; allowed: a cache policy, or None")
    if budget is None or policy is None:
        return policy, None
    if evicts(policy):
        at(policy, budget)  # refuses what it cannot hold, before anything runs
        return policy, budget
    return (policy.replace(budget=budget) if isinstance(policy, Select) else policy), None


def _turns(index: int, example: Example, question_known: bool) -> Iterator[_Turn]:
    """What has to be read of an example: its context once, or once for each question that goes with it."""
    asked = []
    for number, question in enumerate(example.questions):
        known = question.ids[:-1] if question_known else ()
        lines: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        ids = question.ids[len(known) :]
        for answer in question.answers:
            lines.setdefault(ids + answer[:-1], []).append(answer)
        made = [(number, Line(fed, len(ids) - 1, tuple(answers))) for fed, answers in lines.items()]
        if question_known:
            yield _Turn(index, example.context + known, tuple(made))
        asked += made
    if not question_known:
        yield _Turn(index, example.context, tuple(asked))


def _check_lengths(model: Any, turns: Sequence[_Turn]) -> None:
    longest = max(len(turn.context) + len(line.fed) for turn in turns for _, line in turn.lines)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(f"an example with its question has {longest} tokens; this model reads {most} at most")


def _groups(cells: Sequence[Cell]) -> Iterator[tuple[tuple[CachePolicy | None, ...], list[int]]]:
    """Policies that share a reading, and the cells that they serve."""
    policies = dict.fromkeys(policy for policy, _ in cells)
    groups: list[tuple[CachePolicy | None, ...]] = [(None,)] if None in policies else []
    groups += reading_groups(policy for policy in policies if policy is not None)
    for group in groups:
        yield group, [place for place, (policy, _) in enumerate(cells) if policy in group]


def _padded(rows: Sequence[tuple[int, ...]], device: Any) -> tuple[Int[Tensor, "rows width"], Tensor | None]:
    """Rows of one width, filled up on the left, and a mask of what is real where they differ."""
    width = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    sizes = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, (torch.arange(width, device=device) >= width - sizes).long()


class _Plain:
    """A context read by the model as it is."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor | None) -> None:
        began = now(model.device)
        with torch.inference_mode():
            places = {} if mask is None else {"attention_mask": mask, **_positions(model, mask, ids.shape[1])}
            out = model(ids, use_cache=True, logits_to_keep=1, **places)
        self.seconds = now(model.device) - began
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise UnsupportedModelError(f"{type(model).__name__} gives no past_key_values that a question could follow")

    def cache(self, place: int = 0, budget: Any = None) -> Any:
        return _fork(self._cache)


@contextmanager
def _reading(model: Any, group: tuple[CachePolicy | None, ...], ids: Tensor, mask: Tensor | None) -> Iterator[Any]:
    policies = [policy for policy in group if policy is not None]
    if not policies:
        yield _Plain(model, ids, mask)
        return
    places = None if mask is None else _positions(model, mask, ids.shape[1]).get("position_ids")
    with read(model, policies, ids, attention_mask=mask, position_ids=places) as reading:
        yield reading


def _ask(
    model: Any, cache: Any, turns: Sequence[_Turn], mask: Tensor | None, steps: bool
) -> Iterator[tuple[_Turn, int, dict[tuple[int, ...], Heard]]]:
    """Put every line of the turns to a copy of the cache, the last one to the cache itself."""
    passes = max(len(turn.lines) for turn in turns)
    for k in range(passes):
        # A turn with fewer lines than another repeats its last one, and is not listened to.
        asked = [turn.lines[min(k, len(turn.lines) - 1)] for turn in turns]
        left = cache if k == passes - 1 else _fork(cache)
        told = hear(model, left, [line for _, line in asked], mask, steps)
        for turn, (number, line), heard in zip(turns, asked, told, strict=True):
            if k < len(turn.lines):
                yield turn, number, dict(zip(line.answers, heard, strict=True))


def _after(model: Any, cache: Any, mask: Tensor | None, count: int, before: int) -> dict[str, Any]:
    """Arguments of a pass over ``count`` tokens that follow a context and ``before`` more."""
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if mask is not None:
        whole = torch.cat([mask, mask.new_ones(mask.shape[0], before + count)], dim=1)
        options |= {"attention_mask": whole, **_positions(model, whole, count)}
    return options


def _positions(model: Any, mask: Tensor, count: int) -> dict[str, Tensor]:
    """Place of each of the last tokens among its row's real ones, where the model asks for it."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -count:]}


def _fork(cache: Any) -> Any:
    return cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)


def _nbytes(cache: Any) -> int:
    """Bytes of storage that a cache holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    }
    return sum(held.values())


def _decode_seconds(
    model: Any, policy: CachePolicy | None, budget: int | float | None, turn: _Turn, tokens: int
) -> float | None:
    """Median seconds of a decoded token after a context."""
    if not tokens:
        return None
    ids = torch.tensor([turn.context], device=model.device)
    if policy is not None:
        times = time_policy(model, policy if budget is None else at(policy, budget), ids, tokens)[1]
    else:
        times, cache, token = [], _Plain(model, ids, None).cache(), ids[:, -1:]
        with torch.inference_mode():
            for _ in range(WARM_UP + tokens):
                began = now(model.device)
                out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
                times.append(now(model.device) - began)
        times = times[WARM_UP:]
    return sorted(times)[len(times) // 2]
