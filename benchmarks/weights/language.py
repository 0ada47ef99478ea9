"""What the scripts of this folder share about language: SmolLM2, texts of several kinds, facts as questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vestige.evidence.data.text import passage, read_source
from vestige.evidence.runs.models import build, tokenizer_of
from vestige.evidence.runs.retain import stream_of
from vestige.evidence.runs.sources import Examples, Row, Sets, chosen, encoded, examples
from vestige.evidence.runs.spec import Data, Model
from vestige.models.hub import load
from vestige.weights.retain import Stream
from vestige.weights.retain.padding import PadTokens

__all__ = [
    "DOMAINS",
    "GENERAL",
    "Language",
    "domains",
    "fact_stream",
    "facts_to_forget",
    "general_text",
    "new_small",
    "smollm2",
]

DOMAINS = {"speeches": "sotu", "Python": "code", "glosses": "wordnet"}
GENERAL = "moby-dick"
LENGTH = 256
FIELDS = {"elements": ["symbol", "number"], "countries": ["capital", "region"]}
OTHERS = 60  # countries that stand beside the elements, to be kept


@dataclass(frozen=True)
class Language:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def collate(self) -> PadTokens:
        return PadTokens(self.tokenizer.pad_token_id or 0)


def smollm2(device: str) -> Language:
    """SmolLM2-135M-Instruct with weights in float32, in which small steps add up."""
    torch.set_float32_matmul_precision("high")
    return Language(*load("smollm2", dtype="float32", device=device))


def new_small(device: str, seed: int) -> Language:
    """A new model of bytes, of half a million weights, that knows nothing yet."""
    sizes = Model(new={"num_hidden_layers": 3}, seed=seed)
    tokenizer = tokenizer_of(sizes)
    return Language(build(sizes, Examples("text", [], []), tokenizer).to(device), tokenizer)


def blocks(tokenizer: Any, source: str, count: int, seed: int, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """So many stretches of running text, from where the seed begins."""
    ids = torch.tensor(passage(tokenizer, read_source(source), count * length, seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids.view(count, length)]


def domains(tokenizer: Any, seed: int, train: int, test: int, length: int = LENGTH) -> Stream:
    """Texts of one kind after the other; what is asked stands before what is taught."""
    parts = {}
    for name, source in DOMAINS.items():
        rows = blocks(tokenizer, source, test + train, seed, length)
        parts[name] = (rows[test:], rows[:test])
    return Stream.of(parts, inputs="input_ids")


def general_text(tokenizer: Any, seed: int, samples: int, held_out: int, length: int = LENGTH) -> tuple[Any, Any]:
    """Text of another kind: some that learners may be given, and some that only the score looks at."""
    rows = blocks(tokenizer, GENERAL, samples + held_out, seed, length)
    return rows[:samples], rows[samples:]


def fact_stream(tokenizer: Any, seed: int, subjects: int) -> Stream:
    """One property of elements, then of countries, after the other; asked for as they were taught."""
    parts = {}
    for name, fields in FIELDS.items():
        found = examples(Data(name=name, fields=fields, limit=subjects, seed=seed, unseen=0.01))  # type: ignore[arg-type]
        stream, _ = stream_of(found, "field", "class", tokenizer)
        parts |= {e.name: (e.train.source, e.test.source) for e in stream}
    return Stream.of(parts, inputs="input_ids")


def facts_to_forget(tokenizer: Any, seed: int, subjects: int, limit: int | None = None) -> Sets:
    """All that is asked of some elements is to be forgotten; other elements and countries are to be kept."""
    encode = encoded(tokenizer)
    found = examples(Data(name="elements", limit=limit, seed=seed))
    names = list(dict.fromkeys(row["subject"] for row in found.train))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:subjects].tolist()
    sets = chosen(found, {"subject": [names[n] for n in order]}, seed, encode)
    return Sets(sets.forget, [*sets.retain, *_countries(encode, seed, limit)], sets.unseen, sets.paraphrases)


def _countries(encode: Any, seed: int, limit: int | None) -> list[Row]:
    found: Examples = examples(Data(name="countries", limit=min(OTHERS, limit or OTHERS), seed=seed))
    return [encode(row, "question") for row in found.train]
