"""How overshadowing grows with imbalance and with the length of what two statements share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.context.steer.overshadowing import SelfContrast, Span
from vestige.core.method import Paper, Verdict, param
from vestige.errors import SpecError
from vestige.evidence.studies.study import Bench, Finding, Seen, Study

if TYPE_CHECKING:
    from vestige.evidence.report.page import Figure

__all__ = ["Asked", "OvershadowingGrowth", "Statements", "ask", "learn", "log_slope", "separation"]

BEGIN, ASK, WORDS = 1, 3, 4  # tokens: 0 and 2 are padding and end; words begin at WORDS
CONDITIONS, ANSWERS = 64, 64


@dataclass(frozen=True)
class Statements:
    """Statements of the form: subject, condition, question mark, answer.

    Of each subject, ``ratio`` conditions have one answer in common and one condition has another. Subjects, conditions
    and answers are drawn from the same words for all, so that nothing but the whole statement tells.

    Attributes:
        tokens: all statements, the rare one of each subject first.
        ratio: common statements for each rare one.
        length: words of a subject.
        vocabulary: number of tokens.
    """

    tokens: Int[Tensor, "statements length"]
    ratio: int
    length: int
    vocabulary: int

    @classmethod
    def draw(cls, seed: int, subjects: int, ratio: int, length: int) -> Statements:
        """Statements of ``subjects`` subjects; their first words are all different."""
        chance = torch.Generator().manual_seed(seed)
        conditions, answers = WORDS + subjects, WORDS + subjects + CONDITIONS
        rows = []
        for first in range(WORDS, conditions):
            rest = WORDS + torch.randint(subjects, (length - 1,), generator=chance)
            said = conditions + torch.randperm(CONDITIONS, generator=chance)[: ratio + 1]
            rare, common = (answers + torch.randperm(ANSWERS, generator=chance)[:2]).tolist()
            for place, condition in enumerate(said.tolist()):
                rows.append([BEGIN, first, *rest.tolist(), condition, ASK, common if place else rare])
        return cls(torch.tensor(rows), ratio, length, answers + ANSWERS)

    @property
    def rare(self) -> Tensor:
        """The rare statement of each subject."""
        return self.tokens[:: self.ratio + 1]

    @property
    def common(self) -> Tensor:
        """One of the common statements of each subject."""
        return self.tokens[1 :: self.ratio + 1]

    def spans(self, prompt: Sequence[int]) -> list[Span]:
        """The conditions of a prompt: each word of the subject, and what is asked of it."""
        return [(place, place + 1) for place in range(1, len(prompt) - 1)]


@dataclass(frozen=True)
class Asked:
    """Answers to the rare and to the common question of each subject.

    Attributes:
        overshadowed: whether the rare question got the common answer.
        right: whether it got its own.
        common: whether the common question got its own.
        indicators: of the rare and of the common questions, where they were asked with self-contrast.
    """

    overshadowed: Tensor
    right: Tensor
    common: Tensor
    indicators: tuple[Tensor, Tensor] | None = None


def learn(
    data: Statements, seed: int, *, hidden: int, passes: int, updates: int, rate: float, device: Any = "cpu"
) -> Any:
    """A small Llama that has read each statement ``passes`` times, in ``updates`` steps for each pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": BEGIN, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=data.vocabulary, **sizes, **heads, **ends)).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    tokens = data.tokens.to(device)
    with torch.enable_grad():
        for _ in range(passes):
            for rows in torch.randperm(len(tokens), generator=order).chunk(updates):
                some = tokens[rows.to(device)]
                logits = model(some[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]
                optimiser.zero_grad()
                F.cross_entropy(logits, some[:, -1]).backward()
                optimiser.step()
    return model.eval()


def ask(model: Any, data: Statements, batch: int, decoding: SelfContrast | None = None) -> Asked:
    """Ask the rare and a common question of each subject, greedily, with or without self-contrast."""
    said, indicators = [], []
    for statements in (data.rare, data.common):
        words, values = [], []
        for rows in statements.to(model.device).split(batch):
            given = {"input_ids": rows[:, :-1], "attention_mask": torch.ones_like(rows[:, :-1])}
            how = {"max_new_tokens": 1, "do_sample": False}
            if decoding is None:
                words.append(model.generate(**given, **how)[:, -1])
            else:
                with decoding.attach(model, spans=data.spans) as steered:
                    words.append(model.generate(**given, **how)[:, -1])
                    values += [hidden.indicator for hidden in steered.hidden]
        said.append(torch.cat(words).cpu())
        indicators.append(torch.tensor(values))
    return Asked(
        overshadowed=said[0] == data.common[:, -1],
        right=said[0] == data.rare[:, -1],
        common=said[1] == data.common[:, -1],
        indicators=None if decoding is None else (indicators[0], indicators[1]),
    )


def log_slope(at: Float[Tensor, " places"], rates: Float[Tensor, " places"]) -> Float[Tensor, " two"]:
    """Least squares of rates on the binary logarithm of ``at``: slope per doubling, and correlation."""
    x = at.double().log2()
    x, y = x - x.mean(), rates.double() - rates.double().mean()
    slope = (x * y).sum() / (x * x).sum()
    spread = (x * x).sum().sqrt() * (y * y).sum().sqrt()
    return torch.stack([slope, torch.where(spread > 0, (x * y).sum() / spread.clamp_min(1e-300), spread)])


def separation(low: Float[Tensor, " some"], high: Float[Tensor, " others"]) -> Float[Tensor, ""]:
    """Chance that a value of ``low`` lies below one of ``high``, ties counted half (the area under the ROC curve)."""
    below = (low[:, None] < high[None]).double() + 0.5 * (low[:, None] == high[None]).double()
    return below.mean()


class OvershadowingGrowth(Study):
    """A rare condition is overshadowed the more, the more often the common one was seen and the more they share.

    Small models read statements about subjects. Of each subject, many conditions have one answer and a single one has
    another. Asked with that one, a model that gives the common answer has been overshadowed. Every statement is read
    equally often, and in equally many steps whatever the ratio, so that only the imbalance differs.
    """

    name = "overshadowing-growth"
    paper = Paper(
        title="Knowledge Overshadowing Causes Amalgamated Hallucination in Large Language Models",
        year=2024,
        arxiv="2407.08039",
        equations="hallucination rate against imbalance and length of the shared condition (sections 3 and 4); "
        "anticipation and self-contrastive decoding (section 5)",
    )
    verdict = Verdict(
        "not reproduced",
        "5 of 6 findings held (3 seeds): the rate rises by 10 to 18 points for each doubling of the imbalance, but by "
        "only 1 to 4 for each doubling of the length, where 2 were due in every seed",
    )
    FULL: ClassVar[Mapping[str, Any]] = {
        "ratios": (2, 4, 8, 16, 32),
        "lengths": (1, 2, 4, 8, 16),
        "hidden": 128,
        "subjects": 96,
    }

    ratios: tuple[int, ...] = param((2, 4, 8, 16), "common statements for each rare one")
    lengths: tuple[int, ...] = param((1, 2, 4, 8), "words that the statements about a subject share")
    ratio: int = param(8, "the ratio at which lengths are compared and decoding is tried", ge=1)
    length: int = param(4, "the length at which ratios are compared and decoding is tried", ge=1)
    subjects: int = param(48, "subjects, of each of which there is one rare statement", ge=2)
    hidden: int = param(64, "width of the model", ge=8)
    passes: int = param(20, "times that each statement is read", ge=1)
    updates: int = param(4, "optimiser's steps for each pass", ge=1)
    rate: float = param(2e-3, "learning rate", gt=0)
    decoding: SelfContrast = param(help="how overshadowing is reduced", factory=lambda: SelfContrast())
    batch: int = param(48, "questions that are asked together", ge=1)

    def check(self) -> None:
        for name in ("ratios", "lengths"):
            values = getattr(self, name)
            if len(values) < 2 or list(values) != sorted(set(values)) or values[0] < 1:
                raise SpecError(f"{self.name}: parameter {name!r} is {values!r}; allowed: two or more, rising, from 1")
        if max(*self.ratios, self.ratio) >= CONDITIONS:
            raise SpecError(f"{self.name}: parameter 'ratios' is {self.ratios!r}; allowed: below {CONDITIONS}")
        if self.hidden % 8:
            raise SpecError(f"{self.name}: parameter 'hidden' is {self.hidden!r}; allowed: multiples of 8")

    def measure(self, seed: int, bench: Bench) -> Seen:
        shapes = [(ratio, self.length) for ratio in self.ratios] + [(self.ratio, length) for length in self.lengths]
        wanted = list(dict.fromkeys([*shapes, (self.ratio, self.length)]))
        rates, steered = {}, {}
        for place, (ratio, length) in enumerate(wanted):
            bench.tell(place / len(wanted), f"{ratio} to 1, {length} words")
            data = Statements.draw(seed, self.subjects, ratio, length)
            how = {"hidden": self.hidden, "passes": self.passes, "updates": self.updates, "rate": self.rate}
            model = learn(data, seed, **how, device=bench.device)  # type: ignore[arg-type]
            plain, against = ask(model, data, self.batch), ask(model, data, self.batch, self.decoding)
            rates[ratio, length] = float(plain.overshadowed.double().mean())
            steered[ratio, length] = float(against.overshadowed.double().mean())
            if (ratio, length) == (self.ratio, self.length):
                single = self._decoded(plain, against)
        return {
            "by ratio": [rates[ratio, self.length] for ratio in self.ratios],
            "by ratio, steered": [steered[ratio, self.length] for ratio in self.ratios],
            "by length": [rates[self.ratio, length] for length in self.lengths],
            "by length, steered": [steered[self.ratio, length] for length in self.lengths],
            **single,
        }

    @staticmethod
    def _decoded(plain: Asked, against: Asked) -> dict[str, float]:
        """What decoding does, and what its indicator tells, at the one ratio and length."""
        assert against.indicators is not None
        hidden = plain.overshadowed
        low = against.indicators[0][hidden]
        high = torch.cat([against.indicators[0][plain.right], against.indicators[1][plain.common]])
        told = float(separation(low, high)) if len(low) and len(high) else 0.5
        return {
            "right": float(plain.right.double().mean()),
            "right, steered": float(against.right.double().mean()),
            "common": float(plain.common.double().mean()),
            "common, steered": float(against.common.double().mean()),
            "separation": told,
        }

    def findings(self, seen: Sequence[Seen]) -> tuple[Finding, ...]:
        def fitted(name: str, places: tuple[int, ...], which: int) -> tuple[float, ...]:
            at = torch.tensor(places, dtype=torch.float64)
            return tuple(float(log_slope(at, torch.tensor(one[name]))[which]) for one in seen)

        imbalance = "The rate of overshadowing grows with the imbalance of common and rare statements."
        shared = "It grows with the length of what the statements share."
        decoding = "Self-contrastive decoding reduces it without training."
        return (
            Finding(
                claim=imbalance,
                quantity="rise of the rate for each doubling of the ratio",
                measured=fitted("by ratio", self.ratios, 0),
                at_least=0.05,
            ),
            Finding(
                claim=imbalance,
                quantity="correlation of the rate with the logarithm of the ratio",
                measured=fitted("by ratio", self.ratios, 1),
                at_least=0.9,
            ),
            Finding(
                claim=shared,
                quantity="rise of the rate for each doubling of the length",
                measured=fitted("by length", self.lengths, 0),
                at_least=0.02,
            ),
            Finding(
                claim=decoding,
                quantity="share of the overshadowed questions that are no longer",
                measured=tuple(self._relieved(one) for one in seen),
                at_least=0.1,
            ),
            Finding(
                claim=decoding,
                quantity="common questions still answered, of those that were",
                measured=tuple(one["common, steered"] / max(one["common"], 1e-9) for one in seen),
                at_least=0.95,
            ),
            Finding(
                claim="The overshadowed condition is found before the answer is given.",
                quantity="chance that an overshadowed question has a lower indicator than one answered rightly",
                measured=tuple(one["separation"] for one in seen),
                at_least=0.7,
            ),
        )

    def _relieved(self, one: Seen) -> float:
        """Over all ratios."""
        before, after = sum(one["by ratio"]), sum(one["by ratio, steered"])
        return (before - after) / before if before else 0.0

    def figures(self, seen: Sequence[Seen]) -> tuple[Figure, ...]:
        from vestige.evidence.report.page import Figure
        from vestige.evidence.report.study_figures import lines

        drawn = []
        for name, places, across in (
            ("by ratio", self.ratios, "common statements for each rare one"),
            ("by length", self.lengths, "words that the statements share"),
        ):
            series = {
                "greedy": (places, [one[name] for one in seen]),
                "self-contrast": (places, [one[f"{name}, steered"] for one in seen]),
            }
            figure = lines(series, across=across, up="rare questions with the common answer", log="x")
            figure.update_yaxes(tickformat=".0%", rangemode="tozero")
            means = " to ".join(f"{sum(one[name][end] for one in seen) / len(seen):.0%}" for end in (0, -1))
            drawn.append(
                Figure(
                    name.replace(" ", "-"),
                    figure,
                    f"Overshadowing {name}",
                    "Mean of the seeds, with the smallest and the largest. Lower is better; the axis is logarithmic.",
                    f"Greedily, the rate goes from {means} from the least to the most.",
                )
            )
        return tuple(drawn)

    def about(self) -> tuple[str, ...]:
        return (
            f"Llama models of two layers and width {self.hidden} learn statements about {self.subjects} subjects: of "
            "each, several conditions with the same answer and one with another. Words are random and shared by all "
            "subjects. A statement is read "
            f"{self.passes} times in {self.passes * self.updates} steps, whatever the ratio and the length. The paper "
            "fine-tunes pretrained models on sentences that it made to the same pattern.",
            "The rate is the share of the rare questions that get the common answer, greedily. Self-contrast tries "
            "each word of the subject, and the condition, as what might be overshadowed.",
        )

    def formulas(self) -> Mapping[str, Callable[..., Any]]:
        return {"log_slope": log_slope, "separation": separation}
