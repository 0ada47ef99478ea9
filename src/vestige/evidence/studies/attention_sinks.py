"""Attention sinks: which heads rest on the first token, on what inputs, and when they begin to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError, SpecError
from vestige.evidence.data.text import passages
from vestige.evidence.probes.sink_share import sink_share
from vestige.evidence.report.page import Figure
from vestige.evidence.studies.small_lm import Mixing, SmallLM, byte_text, loss_on, train, weights_of
from vestige.evidence.studies.study import Bench, Finding, Seen, Study

__all__ = ["AttentionSinks"]

NATURAL, RANDOM, REPEATED = "natural text", "random tokens", "one token repeated"
TRIGGERS = b" um"  # bytes of the small models' language after which the byte before them comes again
BEGIN = 0  # the byte that every text of that language begins with
ASKED = 64  # texts that the small models are looked at on
LOOKS = 5  # times that they are looked at while training


class AttentionSinks(Study):
    """Measure which heads give the first token much of their attention, and train small models until theirs do.

    The metric: a head is a sink on a text if its mean attention to the first token, over all queries, exceeds
    a threshold; the share of heads and layers that are, averaged over texts. It is taken on natural text, on random
    tokens and on one token repeated; and while training small decoders that differ in one thing, whether attention
    weights have to sum to one (softmax) or not (sigmoid).
    """

    name = "attention-sinks"
    paper = Paper(
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        year=2024,
        arxiv="2410.10781",
        venue="ICLR 2025",
        code="https://github.com/sail-sg/Attention-Sink",
        equations="the sink metric (threshold 0.3, 64 tokens); inputs; sigmoid attention without normalisation",
    )
    verdict = Verdict(
        "not reproduced",
        "As claimed, 69 to 77% of SmolLM2's heads are sinks on text, 74 to 80% on random tokens, none on a repeated "
        "token; after 500 steps small models with softmax have 3, 6 and 89%, where 10% were due; with sigmoid 0 to 2%",
    )
    MODEL = "smollm2"
    FULL = {"texts": 100, "steps": 5000}  # noqa: RUF012

    threshold: float = param(0.3, "mean attention to the first token from which a head is a sink", gt=0, lt=1)
    length: int = param(64, "tokens of each text", ge=4)
    texts: int = param(4, "texts of each kind that the model is looked at on", ge=1)
    reach: int = param(32, "bytes of each text that the small models are trained on", ge=4)
    hidden: int = param(32, "their width", ge=8)
    heads: int = param(1, "attention heads of each of their layers", ge=1)
    layers: int = param(1, "their layers", ge=1)
    rows: int = param(8, "texts per step of their training", ge=1)
    steps: int = param(500, "steps of their training", ge=LOOKS)
    rate: float = param(1e-2, "highest learning rate", gt=0)

    def check(self) -> None:
        if self.hidden % (2 * self.heads):
            allowed = f"2 x heads must divide hidden = {self.hidden}"
            raise SpecError(f"{self.name}: parameter 'heads' is {self.heads}; {allowed}")

    def measure(self, seed: int, bench: Bench) -> Seen:
        """The metric by kind of text, each head's attention to the first token, and both along the training."""
        assert bench.lm is not None
        sinks, attention = {}, None
        for place, (kind, ids) in enumerate(self._inputs(seed, bench).items()):
            bench.tell(0.1 * place, f"looking at {kind}")
            share = np.concatenate([sink_share(bench.lm[0], some) for some in ids.split(self.batch)])
            received = with_first(share, self.length)
            sinks[kind] = sink_rate(received, self.threshold)
            attention = received.mean(0).round(4).tolist() if attention is None else attention
        training = {}
        for place, form in enumerate(("softmax", "sigmoid")):
            training[form] = self._train(form, seed, bench, 0.3 + 0.35 * place)
        return {"sinks": sinks, "attention": attention, "training": training}

    def _inputs(self, seed: int, bench: Bench) -> dict[str, Int[Tensor, "texts tokens"]]:
        model, tokenizer = bench.lm  # type: ignore[misc]
        chance = torch.Generator().manual_seed(seed)
        usual = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        if len(usual) < self.texts:
            raise InputError(f"{self.name}: the tokenizer has {len(usual)} tokens; {self.texts} different are needed")
        tokens = torch.tensor(usual)
        drawn = tokens[torch.randint(len(tokens), (self.texts, self.length), generator=chance)]
        single = tokens[torch.randperm(len(tokens), generator=chance)[: self.texts]]
        seeds = tuple(1000 * seed + text for text in range(self.texts))
        kinds = {
            NATURAL: passages(tokenizer, self.length, seeds),
            RANDOM: drawn,
            REPEATED: single[:, None].expand(-1, self.length),
        }
        return {kind: ids.to(model.device) for kind, ids in kinds.items()}

    def _train(self, form: Any, seed: int, bench: Bench, done: float) -> dict[str, list[float]]:
        """Steps, metric, largest attention of any head to the first token, and loss, of one small model."""
        torch.manual_seed(seed)
        mixing = [Mixing(form=form)] * self.layers
        model = SmallLM(mixing, self.hidden, self.heads, self.reach, parallel=True).to(bench.device)
        language = Echoes()
        asked = language.draw(torch.Generator().manual_seed(2**32 + seed), ASKED, self.reach)
        looked: dict[str, list[float]] = {"steps": [], "sinks": [], "highest": [], "loss": []}
        looks = {round(look * self.steps / LOOKS) for look in range(1, LOOKS + 1)}

        def look(step: int) -> None:
            received = torch.cat([self._received(model, some) for some in asked[:, :-1].split(self.batch)])
            looked["steps"].append(step)
            looked["sinks"].append(sink_rate(received, self.threshold))
            looked["highest"].append(float(received.mean(0).max()))
            looked["loss"].append(loss_on(model, asked, self.batch))

        def after(step: int) -> None:
            bench.tell(done + 0.35 * step / self.steps, f"training with {form}")
            if step in looks:
                look(step)

        look(0)
        draw = partial(language.draw, rows=self.rows, length=self.reach)
        train(model, draw, steps=self.steps, rate=self.rate, seed=seed, after=after)
        return looked

    @torch.no_grad()
    def _received(self, model: SmallLM, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch layers heads"]:
        seen: list[Tensor] = []
        model(ids.to(model.embedding.weight.device), seen)
        return received(proxies(torch.stack(seen, 1))).cpu()

    def findings(self, seen: Sequence[Seen]) -> tuple[Finding, ...]:
        def sinks(kind: str) -> tuple[float, ...]:
            return tuple(one["sinks"][kind] for one in seen)

        def last(form: str, what: str, look: int = -1) -> tuple[float, ...]:
            return tuple(one["training"][form][what][look] for one in seen)

        metric = "share of heads that are sinks"
        return (
            Finding(
                claim="Small models have sinks too",
                quantity=f"{metric}, {NATURAL}",
                measured=sinks(NATURAL),
                at_least=0.5,
            ),
            Finding(
                claim="Sinks need no meaning: they stand on random tokens as well",
                quantity=f"{metric}, {RANDOM}",
                measured=sinks(RANDOM),
                at_least=0.5,
            ),
            Finding(
                claim="With rotary positions there is no sink where all tokens are the same",
                quantity=f"{metric}, {REPEATED}",
                measured=sinks(REPEATED),
                at_most=0.05,
            ),
            Finding(
                claim="Sinks are not there from the beginning",
                quantity=f"{metric} before training, softmax",
                measured=last("softmax", "sinks", 0),
                at_most=0.02,
            ),
            Finding(
                claim="They emerge while training",
                quantity=f"{metric} after training, softmax",
                measured=last("softmax", "sinks"),
                at_least=0.1,
            ),
            Finding(
                claim="Without normalisation they do not",
                quantity=f"{metric} after training, sigmoid",
                measured=last("sigmoid", "sinks"),
                at_most=0.05,
            ),
        )

    def figures(self, seen: Sequence[Seen]) -> tuple[Figure, ...]:
        from vestige.evidence.report.figures import head_map
        from vestige.evidence.report.study_figures import bars, lines

        steps = seen[0]["training"]["softmax"]["steps"]
        forms = list(seen[0]["training"])
        emerging = lines(
            {form: (steps, [one["training"][form]["highest"] for one in seen]) for form in forms},
            across="steps of training",
            up="attention to the first token",
            predicted={"threshold": ([steps[0], steps[-1]], [self.threshold] * 2)},
        )
        kinds = bars(
            {"heads": {kind: [one["sinks"][kind] for one in seen] for kind in seen[0]["sinks"]}},
            across="share of heads that are sinks",
        )
        attention = np.mean([one["attention"] for one in seen], axis=0)
        return (
            Figure(
                "emergence",
                emerging,
                "A sink emerges",
                "Mean attention to the first token of the head that gives it most, small models. Bands: from the "
                "smallest to the largest of the seeds.",
                "Attention to the first token while training, with softmax and with sigmoid.",
            ),
            Figure("kinds", kinds, "Sinks by kind of text", "On the model looked at.", "Share of sink heads by input."),
            Figure(
                "sink-heads",
                head_map(attention, "attention to the first token"),
                "Attention to the first token",
                f"Natural text of {self.length} tokens, mean over {self.texts} texts and all seeds.",
                "Heat map of every head's mean attention to the first token.",
            ),
        )

    def about(self) -> tuple[str, ...]:
        return (
            f"A head's mean attention to the first of {self.length} tokens, over all queries including the first, is "
            f"compared with {self.threshold}. Natural text is Python's language reference; the first token is whatever "
            "the passage begins with. Where weights are not normalised, each query's are divided by their sum before "
            "they are looked at.",
            f"The small decoders ({_count(self.layers, 'layer')} of {_count(self.heads, 'head')}, channel mixer beside "
            "attention) learn a language in which most bytes follow the one before as they do in that text, and after "
            "three of them the byte before comes again: attention has something to do at few places only. The paper "
            "trains on web text, for which models of this size would need many thousand steps.",
        )

    def formulas(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "received": received,
            "proxies": proxies,
            "sink_rate": sink_rate,
            "with_first": with_first,
            "sigmoid": lambda q, k: weights_of(q, k, "sigmoid"),
        }


class Echoes:
    """A language of bytes: each follows the last as in real text, but after a trigger the one before it returns."""

    def __init__(self) -> None:
        text, _ = byte_text()
        pairs = torch.zeros(256, 256, dtype=torch.float64)
        pairs.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1, dtype=torch.float64), accumulate=True)
        pairs[:, BEGIN] = 0
        pairs[BEGIN] = torch.bincount(text, minlength=256)
        self.rising = pairs.cumsum(1)
        self.triggers = torch.zeros(256, dtype=torch.bool)
        self.triggers[list(TRIGGERS)] = True

    def draw(self, chance: torch.Generator, rows: int, length: int) -> Int[Tensor, "rows length+1"]:
        """Texts that begin with :data:`BEGIN`."""
        texts = torch.full((rows, length + 1), BEGIN)
        thrown = torch.rand(rows, length, generator=chance, dtype=torch.float64)
        for place in range(1, length + 1):
            before = texts[:, place - 1]
            rising = self.rising[before]
            following = torch.searchsorted(rising, thrown[:, place - 1, None] * rising[:, -1:], right=True)[:, 0]
            echo = self.triggers[before] & (place > 2)
            texts[:, place] = torch.where(echo, texts[:, place - 2], following)
        return texts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def received(weights: Float[Tensor, "... queries keys"]) -> Float[Tensor, ...]:
    """Mean attention to the first token, over all queries."""
    return weights[..., 0].mean(-1)


def proxies(weights: Float[Tensor, "... queries keys"]) -> Float[Tensor, "... queries keys"]:
    """Weights that sum to one for every query, whether they did or not."""
    return weights / weights.sum(-1, keepdim=True)


def sink_rate(received: Any, threshold: float) -> float:
    """Share of heads, over all texts, whose attention to the first token exceeds the threshold."""
    exceeds = received > threshold
    return float(exceeds.sum()) / exceeds.reshape(-1).shape[0]


def with_first(share: Any, length: int) -> Any:
    """Mean over all queries of attention to the first token, from the mean over those after it.

    The first query has nothing else to attend to, and gives it all.
    """
    return (1 + (length - 1) * share) / length
