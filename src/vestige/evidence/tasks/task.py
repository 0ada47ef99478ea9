"""What every task is: its examples, how they are scored, and between which values a score lies.

Two families. A :class:`ContextTask` writes contexts and questions for a model that can read; it shows what is left of
a context in a cache. A :class:`TrainingTask` draws rows of tokens for a model that is trained from nothing; it shows
what a layer can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vestige.core.spec import Spec, param
from vestige.errors import InputError, SpecError
from vestige.evidence.statistics import Interval, bootstrap

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from vestige.context.policy import CachePolicy
    from vestige.core.registry import Registry
    from vestige.evidence.tasks.asking import Heard

__all__ = ["IGNORE", "Batch", "ContextTask", "Example", "Question", "Task", "TaskScore", "TrainingTask"]

IGNORE = -100
"""Target of a token after which nothing is asked; what ``cross_entropy`` leaves out by default."""


class Task(Spec):
    """Base of all tasks: a frozen value whose examples depend on its parameters, its version and a seed alone.

    Class attributes
        name: the slug under which the task is registered (an abstract base has none).
        version: raised whenever the same parameters and seed would give other examples, or another score for them.
        metric: what an example's value is.
        higher_is_better: whether a larger value is the better one.
        stamps: keys of a spec that set nothing, and state what the examples depend on beside the parameters.

    Raises:
        SpecError: on construction, for an unknown parameter, a wrong type or a value out of range.
    """

    version: ClassVar[int] = 1
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    stamps: ClassVar[tuple[str, ...]] = ("version", "text")

    @classmethod
    def registry(cls) -> Registry:
        from vestige.evidence.tasks.registry import registry

        return registry

    @classmethod
    def check_class(cls) -> None:
        if type(cls.__dict__.get("version")) is not int:
            raise SpecError(f"{cls.__module__}.{cls.__qualname__} registers as {cls.name!r} but states no version")

    @property
    def chance(self) -> float | None:
        """Value expected of one who knows the kind of question and nothing of the context; ``None`` if not constant."""
        raise NotImplementedError

    @property
    def ceiling(self) -> float:
        """Value of one who remembers everything."""
        return 1.0

    def stamp(self) -> dict[str, Any]:
        """The version, and what else of :attr:`stamps` the examples depend on, as plain JSON types."""
        return {"version": self.version}

    def spec(self) -> dict[str, Any]:
        """Name, version, every parameter, and whatever else the examples depend on, as plain JSON types."""
        own = super().spec()
        stamp = self.stamp()
        return {"name": own.pop("name"), "version": stamp.pop("version"), **own, **stamp}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        stated = {key: value for key, value in fields.items() if key in cls.stamps and key not in cls.parameters()}
        task = cls(**{key: value for key, value in fields.items() if key not in stated})
        for key, now in task.stamp().items():
            if key in stated and stated[key] != now:
                raise SpecError(
                    f"{cls.name}: the spec is of {key} {stated[key]!r}, which is {now!r} here: "
                    "its examples are others, and so its scores do not compare"
                )
        return task


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked after a context.

    Attributes:
        ids: tokens that follow the context: the question, and the beginning of its answer.
        answer: tokens that come next if it is remembered. Empty where there are choices.
        parts: stretches of the answer, first and one-past-last token, of which each counts for itself; default: one.
        choices: answers to choose among, as tokens.
        right: which of the choices is right.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    right: int = 0

    def __post_init__(self) -> None:
        wrong = (
            "has no tokens before its answer"
            if not self.ids
            else "needs either an answer or choices"
            if bool(self.answer) == bool(self.choices)
            else "has a choice without tokens"
            if not all(self.choices)
            else f"has {len(self.choices)} choices, of which {self.right} is none"
            if self.choices and not 0 <= self.right < len(self.choices)
            else None
        )
        if wrong:
            raise InputError(f"a question {wrong}")

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """The answers whose tokens are looked at."""
        return self.choices or (self.answer,)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context, and what is asked of it.

    Attributes:
        context: tokens that are read, and of which a cache keeps what it keeps.
        questions: each is put to a copy of that cache.
        about: what is worth knowing of the example, in words or numbers (where its fact stands ...).
    """

    context: tuple[int, ...]
    questions: tuple[Question, ...]
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.context or not self.questions:
            raise InputError("an example needs a context and at least one question")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a model made of a task's examples.

    Attributes:
        metric, higher_is_better: of the task.
        values: one number per example, in their order.
        said: per example and question, the tokens that the model held for likeliest: those of the choice, or the most
            likely one at each place of the answer.
        kv_bytes: of the cache when the question is put, per example.
        prefill_seconds: of reading a context; a pass that served several cells counts in full for each.
        decode_seconds_per_token: ``None`` where no decoding was timed.
    """

    metric: str
    higher_is_better: bool = True
    values: tuple[float, ...]
    said: tuple[tuple[tuple[int, ...], ...], ...] = ()
    kv_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds_per_token: float | None = None

    @property
    def value(self) -> float:
        """Mean over the examples."""
        return sum(self.values) / len(self.values)

    def interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """Percentile bootstrap interval of the mean, over examples."""
        return bootstrap(self.values, level=level, draws=draws, seed=seed)


class ContextTask(Task):
    """A task that reads a context and then answers.

    A subclass says how the example of a number is written (:meth:`write`) and, where it is not the share of right
    answers, what it is worth (:meth:`grade`).
    """

    length: int = param(1000, "tokens of the context", ge=1)

    def write(self, tokenizer: PreTrainedTokenizerBase, seed: int, index: int) -> Example:
        """The example with a number, in a model's tokens; it depends on nothing else.

        Raises:
            InputError: ``length`` cannot hold what has to stand in the context.
        """
        raise NotImplementedError

    def grade(self, question: Question, heard: Sequence[Heard]) -> float:
        """What an answer is worth, from what the model made of each of ``question.answers``.

        Right choices count, and right parts of an answer: those whose every token is the likeliest one after the right
        ones before it, as in greedy decoding.
        """
        if question.choices:
            return float(choose(heard) == question.right)
        parts = question.parts or ((0, len(question.answer)),)
        said = heard[0].likely
        return sum(said[first:last] == question.answer[first:last] for first, last in parts) / len(parts)

    def examples(self, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, count: int = 20) -> tuple[Example, ...]:
        """Examples in a model's tokens; the first ones of a larger count are those of a smaller one.

        Raises:
            SpecError: ``seed`` is no int, or ``count`` is not 1 or more.
            InputError: ``length`` cannot hold what has to stand in the context.
        """
        if type(seed) is not int:
            raise SpecError(f"{self.name}: parameter 'seed' is {seed!r}; allowed: int")
        if type(count) is not int or count < 1:
            raise SpecError(f"{self.name}: parameter 'count' is {count!r}; allowed: int >= 1 (examples)")
        return tuple(self.write(tokenizer, seed, index) for index in range(count))

    def score(
        self,
        model: Any,
        examples: Sequence[Example],
        *,
        policy: CachePolicy | None = None,
        batch_size: int = 1,
        question_known: bool = False,
        decode_tokens: int = 0,
    ) -> TaskScore:
        """:meth:`scores` of one policy with the budget that it was built with; ``None``: the model as it is."""
        options: dict[str, Any] = {"question_known": question_known, "decode_tokens": decode_tokens}
        return self.scores(model, examples, [(policy, None)], batch_size=batch_size, **options)[0]

    def scores(
        self,
        model: Any,
        examples: Sequence[Example],
        cells: Sequence[tuple[CachePolicy | None, int | float | None]],
        *,
        batch_size: int = 1,
        question_known: bool = False,
        decode_tokens: int = 0,
    ) -> tuple[TaskScore, ...]:
        """Score several policies under several budgets, with as few readings of the contexts as they allow.

        Contexts are read, caches are cut, and only then are the questions put, each to a copy of the cache; with
        ``question_known`` each question is read with its context before the cut, all but its last token, so that still
        every token of the answer comes out of what was kept. A policy that reads few entries while decoding is
        asked token by token. Values do not depend on ``batch_size``.

        Args:
            model: a causal language model; without a policy any whose output has ``past_key_values``.
            cells: policies with their budgets: entries per head, or a share of the context (float); ``None`` for the
                policy's own. No policy: the model as it is.
            batch_size: contexts that run together.
            question_known: whether the question is known when the cache is cut.
            decode_tokens: how many tokens to decode for the measurement of time, after the first context alone.

        Raises:
            SpecError: an argument of the wrong type or out of range; a policy that cannot have that budget.
            InputError: no examples, or one that is longer than the model reads.
            UnsupportedModelError: the model lacks what a policy needs.
        """
        from vestige.evidence.tasks.asking import ask_all

        for name, number, least in (("batch_size", batch_size, 1), ("decode_tokens", decode_tokens, 0)):
            if type(number) is not int or number < least:
                raise SpecError(f"{self.name}: parameter {name!r} is {number!r}; allowed: int >= {least}")
        told = ask_all(model, examples, cells, batch_size, question_known, decode_tokens)
        return tuple(self._scored(examples, one) for one in told)

    def blind(self, model: Any, examples: Sequence[Example], *, batch_size: int = 1) -> TaskScore:
        """The same questions without the context: what is known, or guessed, anyway.

        Raises:
            InputError: a question is a single token, so nothing is left to be asked after it.
        """
        from vestige.evidence.tasks.asking import ask_all

        begun = [
            Example(context=question.ids[:1], questions=(replace(question, ids=question.ids[1:]),))
            for example in examples
            for question in example.questions
        ]
        told = ask_all(model, begun, [(None, None)], batch_size, False, 0)[0]
        sizes = [len(example.questions) for example in examples]
        heard = [one[0] for one in told.heard]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        regrouped = [tuple(heard[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
        return self._scored(examples, replace(told, heard=regrouped))

    def _scored(self, examples: Sequence[Example], told: Any) -> TaskScore:
        values, said = [], []
        for example, heard in zip(examples, told.heard, strict=True):
            pairs = list(zip(example.questions, heard, strict=True))
            values.append(self.worth([self.grade(question, answers) for question, answers in pairs]))
            said.append(tuple(_said(question, answers) for question, answers in pairs))
        return TaskScore(
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            values=tuple(values),
            said=tuple(said),
            kv_bytes=told.kv_bytes,
            prefill_seconds=told.prefill_seconds,
            decode_seconds_per_token=told.decode_seconds_per_token,
        )

    def worth(self, grades: list[float]) -> float:
        """The value of an example, from the grades of its questions."""
        return sum(grades) / len(grades)


def choose(heard: Sequence[Heard]) -> int:
    """The choice with the highest mean log-probability of its tokens: a long one is not worse for its length."""
    return max(range(len(heard)), key=lambda i: sum(heard[i].logprobs) / len(heard[i].logprobs))


def _said(question: Question, heard: Sequence[Heard]) -> tuple[int, ...]:
    return question.choices[choose(heard)] if question.choices else heard[0].likely


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    Attributes:
        tokens: ``(rows, length)``.
        targets: ``(rows, length)`` what the model is to say after each token; :data:`IGNORE` where nothing is asked.
    """

    tokens: Tensor
    targets: Tensor

    def to(self, device: Any) -> Batch:
        """The rows on a device."""
        return Batch(self.tokens.to(device), self.targets.to(device))


class TrainingTask(Task):
    """A task for models that are trained from nothing.

    ::

        task = vestige.task("mqar", length=64)
        batch = task.draw(32, torch.Generator().manual_seed(0))
        loss = task.loss(model(batch.tokens).logits, batch.targets)
    """

    length: int = param(64, "tokens of a row", ge=1)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; targets are among them."""
        raise NotImplementedError

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """Rows of the task, on the CPU; the same ones for a generator in the same state."""
        raise NotImplementedError

    def check_room(self, needed: int) -> None:
        """Refuse, with :class:`SpecError`, a row too short for what has to stand in it."""
        if self.length < needed:
            raise SpecError(f"{self.name}: parameter 'length' is {self.length}; allowed: int >= {needed} here (tokens)")

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy where something is asked; ``logits`` ``(rows, length, at least vocabulary)``."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def score(
        self, model: Callable[[Tensor], Any], *, seed: int = 0, count: int = 256, batch_size: int = 64
    ) -> TaskScore:
        """Share of right answers in each of ``count`` rows that the seed gives; the same for every ``batch_size``.

        Args:
            model: takes ``(rows, length)`` tokens, and returns logits or an output that has them.

        Raises:
            SpecError: ``count`` or ``batch_size`` is not 1 or more.
        """
        import torch

        for name, number in (("count", count), ("batch_size", batch_size)):
            if type(number) is not int or number < 1:
                raise SpecError(f"{self.name}: parameter {name!r} is {number!r}; allowed: int >= 1")
        batch = self.draw(count, torch.Generator().manual_seed(seed))
        weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        values: list[float] = []
        with torch.inference_mode():
            for tokens, targets in zip(batch.tokens.split(batch_size), batch.targets.split(batch_size), strict=True):
                out = model(tokens if weight is None else tokens.to(weight.device))
                said = getattr(out, "logits", out).argmax(-1).to(targets.device)
                asked = targets != IGNORE
                right = (said == targets) & asked
                values += (right.sum(1) / asked.sum(1)).tolist()
        return TaskScore(metric=self.metric, higher_is_better=self.higher_is_better, values=tuple(values))


def perplexity(logprobs: Sequence[float]) -> float:
    """Of tokens with these log-probabilities."""
    return math.exp(-sum(logprobs) / len(logprobs))
