"""The claims of SEFE: later updates leave what earlier ones changed, and other styles of answer are not unlearnt."""

from __future__ import annotations

import copy
import re
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase
from vestige.evidence.claims import claim
from vestige.evidence.claims.s3ft import END, knowing, learnt
from vestige.evidence.claims.s3ft import row as question_and_answer
from vestige.weights.retain import ContinualRun, Learner
from vestige.weights.retain.sefe import diversified

ASKED = 2
"""The token that ends a question."""
KNOWN, NEW = 24, 24
COLOURS = ("red", "green", "blue", "black", "white", "pink")
FOODS = ("hay", "fish", "nuts", "leaves", "worms", "fruit")


def facts(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Colours that the first model knows, and foods that it is taught."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(field: str, count: int, answers: tuple[str, ...], first: int) -> list[dict[str, str]]:
        picks = torch.randint(len(answers), (count,), generator=draw).tolist()
        return [
            {"subject": f"s{n}", "field": field, "question": f"What {field} has s{n}?", "answer": answers[pick]}
            for n, pick in enumerate(picks, first)
        ]

    return drawn("colour", KNOWN, COLOURS, 0), drawn("food", NEW, FOODS, KNOWN)


def in_every_style(known: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Each fact in a word and, over several draws, in each other style."""
    plain = diversified(known, share=0.0)
    return plain + [fact for n in range(4) for fact in diversified(known, share=1.0, seed=4 * seed + n)]


def split(text: str) -> list[str]:
    """Words and signs."""
    return re.findall(r"\w+|[^\w\s]", text)


@lru_cache
def words() -> dict[str, int]:
    """Everything that can stand in a question or an answer, by its token."""
    told = [fact for part in facts(0) for fact in in_every_style(part, 0)]
    found = {word for fact in told for part in ("question", "answer") for word in split(fact[part])}
    return {word: n for n, word in enumerate(sorted(found | {*COLOURS, *FOODS}), ASKED + 1)}


def row(fact: dict[str, str]) -> dict[str, Tensor]:
    """A question with its answer, which alone is to be predicted."""
    question, answer = ([words()[word] for word in split(fact[part])] for part in ("question", "answer"))
    return question_and_answer([*question, ASKED], [*answer, END])


@lru_cache(maxsize=1)
def first_model(seed: int) -> LlamaForCausalLM:
    """A small model that knows colours, and says them in five styles."""
    rows = [row(fact) for fact in in_every_style(facts(seed)[0], seed)]
    return knowing(rows, ASKED + 1 + len(words()), seed)


def taught(case: LearnerCase, learner: Learner, seed: int, share: float) -> ContinualRun:
    """Foods are learnt, a share of them in other styles; colours are asked for in all but a word."""
    known, new = facts(seed)
    rows = [row(fact) for fact in diversified(new, share, seed)]
    asked = [row(fact) for fact in diversified(new, 0.0)]
    held_out = [row(fact) for fact in in_every_style(known, seed) if fact["style"] != "short"]
    args = case.args(num_train_epochs=60, per_device_train_batch_size=12, learning_rate=3e-3, seed=seed)
    return learnt(learner, copy.deepcopy(first_model(seed)), rows, asked, held_out, args)


@claim(slow=True)
def later_updates_leave_what_earlier_ones_changed(case: LearnerCase) -> Seen:
    """Where the task is known, RegLoRA forgets less over the seeds than the same low-rank updates without it."""
    seen: dict[str, list[float]] = {"forgetting": [], "without": [], "average": [], "average without": []}
    for seed in case.seeds:
        mine, plain = (case.on_digits(each, seed, "task") for each in (case.method, case.method.replace(weight=0.0)))
        for name, value in zip(seen, (mine.forgetting, plain.forgetting, mine.average, plain.average), strict=True):
            seen[name].append(float(value))
    expect(sum(seen["forgetting"]) < sum(seen["without"]), f"no less is forgotten: {seen}")
    expect(sum(seen["average"]) > sum(seen["average without"]), f"no more is known at the end: {seen}")
    return seen


@claim(slow=True)
def answers_in_other_styles_are_not_unlearnt(case: LearnerCase) -> Seen:
    """Fine-tuned on new facts with a fifth of them in other styles, a model still answers old ones in those styles."""
    seen: dict[str, list[float]] = {"kept": [], "kept in one style": [], "new": [], "new in one style": []}
    for seed in case.seeds:
        mine, plain = (taught(case, Learner.from_spec("finetune"), seed, share) for share in (0.2, 0.0))
        values = (mine.general_kept, plain.general_kept, mine.matrix[0, 0], plain.matrix[0, 0])
        for name, value in zip(seen, values, strict=True):
            seen[name].append(float(value or 0.0))
    for n in range(len(case.seeds)):
        expect(seen["kept"][n] > seen["kept in one style"][n] + 0.1, f"no more is kept: {seen}")
        expect(seen["new"][n] > -0.5, f"new facts are not learnt: {seen}")
    return seen
