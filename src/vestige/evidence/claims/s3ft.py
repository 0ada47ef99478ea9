"""The claim of S3FT: who is taught in its own words forgets less, and learns as much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vestige.evidence.certify.suite import Seen, expect
from vestige.evidence.certify.weights_retain import LearnerCase, quiet
from vestige.evidence.claims import claim
from vestige.weights.retain import ContinualRun, ContinualTrainer, Learner, Stream
from vestige.weights.retain.padding import PadTokens

END, ASK, THE, IS = 1, 2, 3, 4
FIRST, SUBJECTS, OBJECTS = 5, 40, 12
KNOWN, TAUGHT, NEW = 24, 12, 8
"""Facts that the model knows; of these, those that it is taught again, in other words; and facts that it does not."""


def row(question: list[int], answer: list[int]) -> dict[str, Tensor]:
    """A question with its answer, which alone is to be predicted."""
    return {
        "input_ids": torch.tensor(question + answer),
        "labels": torch.tensor([-100] * len(question) + answer),
    }


def facts(seed: int) -> list[tuple[int, int]]:
    """Subjects with their objects, as tokens."""
    draw = torch.Generator().manual_seed(seed)
    objects = torch.randint(OBJECTS, (KNOWN + NEW,), generator=draw) + FIRST + SUBJECTS
    return [(FIRST + n, int(thing)) for n, thing in enumerate(objects)]


def whole(subject: int, thing: int) -> dict[str, Tensor]:
    """The question with an answer in a sentence: the first model's way."""
    return row([ASK, subject], [THE, subject, IS, thing, END])


def short(subject: int, thing: int) -> dict[str, Tensor]:
    """The question with an answer in a word: the way of the examples to learn."""
    return row([ASK, subject], [thing, END])


def knowing(rows: list[dict[str, Tensor]], words: int, seed: int) -> LlamaForCausalLM:
    """A small model of so many words that has learnt some rows."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": END}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=words, **sizes, **special))
    batch = PadTokens()(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def first_model(seed: int) -> LlamaForCausalLM:
    """A small model that knows some facts, and says them in sentences."""
    return knowing([whole(*fact) for fact in facts(seed)[:KNOWN]], FIRST + SUBJECTS + OBJECTS, seed)


def learnt(
    learner: Learner, model: LlamaForCausalLM, rows: list[Any], asked: list[Any], held_out: list[Any], args: Any
) -> ContinualRun:
    """Rows are learnt; others of the same are asked for, and those held out are looked at before and after."""
    with quiet():
        trainer = ContinualTrainer(model, learner, args, collator=PadTokens(), held_out=held_out)
        return trainer.run(Stream.of([(rows, asked)], inputs="input_ids"))


def taught(case: LearnerCase, learner: Learner, seed: int, rate: float = 1e-3) -> ContinualRun:
    """Facts in short answers are learnt, some known and some new; known ones in sentences are looked at."""
    known = facts(seed)
    train = [short(*fact) for fact in known[:TAUGHT] + known[KNOWN:]]
    asked = [short(*fact) for fact in known[KNOWN:]]
    held_out = [whole(*fact) for fact in known[TAUGHT:KNOWN]]
    args = case.args(num_train_epochs=12, per_device_train_batch_size=10, learning_rate=rate, seed=seed)
    return learnt(learner, first_model(seed), train, asked, held_out, args)


@claim(slow=True)
def own_words_keep_more_and_learn_no_less(case: LearnerCase) -> Seen:
    """Log-likelihood of known facts in the model's own words falls less than with fine-tuning; new facts are learnt."""
    seen: dict[str, list[float]] = {n: [] for n in ("kept", "kept by finetune", "new", "new by finetune", "own")}
    for seed in case.seeds:
        mine, plain = (taught(case, each, seed) for each in (case.method, Learner.from_spec("finetune")))
        numbers = (mine.general_kept, plain.general_kept, mine.matrix[0, 0], plain.matrix[0, 0])
        for name, value in zip(seen, (*numbers, mine.report["answers"][0]["own"]), strict=True):
            seen[name].append(float(value or 0.0))
    for n in range(len(case.seeds)):
        expect(seen["own"][n] > 0, f"no answer of its own was right: {seen}")
        expect(seen["kept"][n] > seen["kept by finetune"][n] + 0.1, f"no more is kept: {seen}")
        expect(seen["new"][n] > seen["new by finetune"][n] - 0.5, f"new facts are not learnt: {seen}")
    return seen
